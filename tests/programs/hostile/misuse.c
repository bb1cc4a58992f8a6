/* misuse CASE: strange things that a program may try. Prints what matters. */
#include "../guest.h"
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <linux/if_ether.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <sys/prctl.h>

/* A host listener must never become an outgoing connection, nor a connected socket one to somewhere else. */
static void transmute(void) {
    struct sockaddr none = {.sa_family = AF_UNSPEC};
    int listener = tcp(), one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct address any = to("0.0.0.0", 80);
    SAY(bind(listener, (void *)&any.storage, any.length));
    SAY(listen(listener, 5));
    connect(listener, &none, sizeof none);
    shutdown(listener, SHUT_RDWR);
    struct timeval limit = {1, 0};
    setsockopt(listener, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    printf("denied by listener: %d\n", dial(listener, "10.77.0.3", 7007) == 0);
    printf("host loopback by listener: %d\n", dial(listener, "127.0.0.1", 8000) == 0);
    int fd = tcp();
    dial(fd, ORIGIN, 7007);
    /* The lock on the socket stays. */
    struct sock_filter all = {BPF_RET | BPF_K, 0, 0, 0xffffffff};
    struct sock_fprog program = {1, &all};
    int zero = 0;
    SAY(setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program));
    SAY(setsockopt(fd, SOL_SOCKET, SO_DETACH_FILTER, &zero, sizeof zero));
    SAY(setsockopt(fd, SOL_SOCKET, SO_LOCK_FILTER, &zero, sizeof zero));
    connect(fd, &none, sizeof none);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    printf("denied by a dissolved socket: %d\n", dial(fd, "10.77.0.3", 7007) == 0);
    printf("host loopback by a dissolved socket: %d\n", dial(fd, "127.0.0.1", 8000) == 0);
    connect(fd, &none, sizeof none);
    struct address port = to("0.0.0.0", 8123);
    bind(fd, (void *)&port.storage, port.length);
    int rc = listen(fd, 5);
    printf("listens outside: %s\n", rc ? "no" : "maybe");
    struct address denied = to("10.77.0.3", 7007);
    SAY(sendto(fd, "x", 1, MSG_FASTOPEN | MSG_NOSIGNAL, (void *)&denied.storage, denied.length) > 0);
    puts("ready");
    fflush(stdout);
    sleep_ms(500);
}

/* A descriptor of the host passed about: other calls than connect that could reach somewhere. */
static void few_descriptors(void) {
    struct rlimit few = {8, 8};
    setrlimit(RLIMIT_NOFILE, &few);
    int list[8], n = 0;
    while (n < 8 && (list[n] = tcp()) >= 0) n++;
    printf("%d of them, last %s\n", n, strerrorname_np(errno));
    for (int i = 0; i < n; i++) printf("%s\n", result(dial(list[i], ORIGIN, 7007)));
    printf("%s\n", echo(list[n - 1], "enough"));
}

/* Raw junk on the TUN. */
static void junk(void) {
    int raw = socket(AF_INET, SOCK_RAW, IPPROTO_RAW), packet = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));
    fprintf(stderr, "raw %d packet %d\n", raw, packet);
    unsigned char data[2000];
    srand(2);
    for (int i = 0; i < 20000; i++) {
        int n = rand() % sizeof data;
        for (int j = 0; j < n; j++) data[j] = rand();
        if (n > 40) {
            static const unsigned char protocols[] = {1, 6, 17, 2, 58};
            unsigned char head[20] = {0x45, 0, n >> 8, n, 0, i, rand() % 4 ? 0 : rand(), 0, 64, protocols[rand() % 5], 0, 0, 198, 18, 0, 2, 10, 77, 0, 2};
            memcpy(data, head, 20);
            if (rand() % 3 == 0) data[0] = 0x40 | rand() % 16;
            if (rand() % 4 == 0) memcpy(data + 16, "\306\022\0\001", 4);
        }
        struct address a = to(ORIGIN, 0);
        if (raw >= 0) sendto(raw, data, n, MSG_DONTWAIT, (void *)&a.storage, a.length);
        if (packet >= 0) {
            struct sockaddr_ll ll = {.sll_family = AF_PACKET, .sll_protocol = htons(rand() % 2 ? ETH_P_IP : ETH_P_IPV6), .sll_ifindex = 2};
            sendto(packet, data, n, MSG_DONTWAIT, (void *)&ll, sizeof ll);
        }
    }
    int fd = tcp();
    printf("after junk: %s ", result(dial(fd, ORIGIN, 7007)));
    printf("%s\n", echo(fd, "alive"));
    int u = socket(AF_INET, SOCK_DGRAM, 0);
    struct timeval limit = {5, 0};
    setsockopt(u, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    dial(u, ORIGIN, 7007);
    char b[10] = "";
    for (int i = 0; i < 5; i++) {
        send(u, "udp", 3, 0);
        if (recv(u, b, 10, 0) == 3) break;
    }
    printf("and %s\n", b);
}

/* More datagram flows than any bound: old ones give way, none hangs. */
static void flows(void) {
    struct rlimit many = {20000, 20000};
    setrlimit(RLIMIT_NOFILE, &many);
    int fd = 0;
    for (int i = 0; i < 15000; i++) {
        fd = socket(AF_INET, SOCK_DGRAM, 0);
        dial(fd, i % 2 ? ORIGIN : "10.77.0.3", 7007);
        send(fd, "x", 1, 0);
    }
    struct timeval limit = {5, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    char b[10] = "";
    int got = 0;
    for (int i = 0; i < 10 && !got; i++) {
        fd = socket(AF_INET, SOCK_DGRAM, 0);
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        dial(fd, ORIGIN, 7007);
        send(fd, "last", 4, 0);
        got = recv(fd, b, 10, 0) == 4;
    }
    printf("%s\n", b);
    int t = tcp();
    printf("%s\n", result(dial(t, ORIGIN, 7007)));
}

/* SYNs by the TUN without end (by fast open, which is not intercepted), to nobody. */
static void syns(void) {
    for (int i = 0; i < 3000; i++) {
        int fd = tcp_nonblocking();
        struct address a = to(i % 2 ? BLACKHOLE : "10.77.0.3", i % 2 ? 80 : 7007);
        sendto(fd, "x", 1, MSG_FASTOPEN, (void *)&a.storage, a.length);
        if (i % 3) close(fd);
    }
    int fd = tcp();
    printf("%s ", result(dial(fd, ORIGIN, 7007)));
    printf("%s\n", echo(fd, "alive"));
}

/* Kills what it can: init of its namespace survives (pid_namespaces(7)). Never outside a pid namespace of its own: the
 * test tells which one is the machine's. */
static void kill_init(void) {
    char own[64] = "", *machine = getenv("KSO_MACHINE_PIDNS");
    readlink("/proc/self/ns/pid", own, sizeof own - 1);
    if (!machine || !*own || !strcmp(own, machine)) {
        puts("refused: this is not a pid namespace of a sandbox");
        return;
    }
    SAY(kill(1, SIGKILL));
    SAY(kill(1, SIGTERM));
    SAY(kill(1, SIGSTOP));
    sleep_ms(100);
    int fd = tcp();
    printf("%s ", result(dial(fd, ORIGIN, 7007)));
    printf("%s\n", echo(fd, "alive"));
}

/* A filter of its own, as browsers have: denies socket options; and one with a listener of its own. */
static void own_filter(void) {
    struct sock_filter code[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
                                 BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {4, code};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    SAY(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
    SAY(syscall(SYS_getppid));
    int fd = tcp();
    printf("%s ", result(dial(fd, ORIGIN, 7007)));
    printf("%s\n", echo(fd, "alive"));
}

int main(int argc, char **argv) {
    return run_case((struct test_case[]){{"transmute", transmute}, {"few_descriptors", few_descriptors}, {"junk", junk}, {"flows", flows},
        {"syns", syns}, {"kill_init", kill_init}, {"own_filter", own_filter}, {0}}, argc, argv);
}
