/* complaints CASE ARGS: what users of kindred systems ran into, each as small as it gets. */
#include "guest.h"

static char **args;

static int listener(int port, int flags) {
    int fd = socket(AF_INET, SOCK_STREAM | flags, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct address a = to("0.0.0.0", port);
    if (bind(fd, (void *)&a.storage, a.length) || listen(fd, 64)) perror("listen"), exit(1);
    return fd;
}

static void *do_accept(void *p) {
    int fd = accept(*(int *)p, 0, 0);
    close(fd);
    return 0;
}

/* 1: accept blocks in one thread; getsockname, getsockopt, connect, poll in another do not. */
static void blocked_accept(void) {
    int fd = listener(80, 0), peer = tcp();
    pthread_t thread;
    pthread_create(&thread, 0, do_accept, &fd);
    sleep_ms(200);
    double start = now();
    printf("%s\n", name_of(fd, 0));
    printf("accepts %d\n", option(fd, SOL_SOCKET, SO_ACCEPTCONN));
    SAY(dial(peer, ORIGIN, 7007));
    printf("events %x\n", ready(fd, POLLIN, 0));
    printf("%s\n", echo(peer, "meanwhile"));
    int twin = dup(fd);
    printf("%s\n", name_of(twin, 0));
    printf("in time %d\n", now() - start < 1);
    puts("ready"), fflush(stdout);
    pthread_join(thread, 0);
    puts("accepted");
}

/* 2: accept4 of a non-blocking listener never blocks; flags are set as asked. */
static void nonblocking_accept(void) {
    int fd = listener(80, SOCK_NONBLOCK);
    double start = now();
    for (int i = 0; i < 100; i++)
        if (accept4(fd, 0, 0, SOCK_NONBLOCK) != -1 || errno != EAGAIN) puts("did not say EAGAIN");
    printf("in time %d\n", now() - start < 1);
    int blocking = listener(81, 0);
    fcntl(blocking, F_SETFL, O_NONBLOCK);
    SAY(accept(blocking, 0, 0));
    puts("ready"), fflush(stdout);
    ready(fd, POLLIN, 10000);
    struct sockaddr_in peer;
    socklen_t length = sizeof peer;
    int got = accept4(fd, (void *)&peer, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
    printf("flags %x %d, peer %d\n", fcntl(got, F_GETFL) & O_NONBLOCK, fcntl(got, F_GETFD), peer.sin_port != 0);
    printf("own %s\n", name_of(got, 0));
    SAY(accept4(fd, 0, 0, 0));
    char c;
    SAY(read(got, &c, 1));
}

/* 3: the port that bind(0) gives is the port outside. */
static void bind_zero(void) {
    int fd = tcp(), unbound = tcp(), six = socket(AF_INET6, SOCK_STREAM, 0);
    struct address a = to("0.0.0.0", 0), b = to("::", 0);
    SAY(bind(fd, (void *)&a.storage, a.length));
    int before = port_of(fd);
    SAY(listen(fd, 5));
    printf("agree %d\n", before == port_of(fd));
    SAY(listen(unbound, 5));
    SAY(bind(six, (void *)&b.storage, b.length));
    SAY(listen(six, 5));
    printf("ports %d %d %d\n", port_of(fd), port_of(unbound), port_of(six));
    puts("ready"), fflush(stdout);
    int list[] = {fd, unbound, six};
    for (int i = 0; i < 3; i++) {
        int got = accept(list[i], 0, 0);
        printf("accepted on %d\n", port_of(got) == port_of(list[i]));
        write(got, "hello", 5);
        close(got);
    }
}

/* 6: every option of every level, on sockets of each kind: an error or a value, never a crash or a hang. */
static void all_options(void) {
    int server = listener(80, 0), connected = tcp(), fresh = tcp(), udp = socket(AF_INET, SOCK_DGRAM, 0), six = socket(AF_INET6, SOCK_STREAM, 0);
    dial(connected, ORIGIN, 7007);
    dial(six, ORIGIN6, 7007);
    struct { const char *name; int fd; } list[] = {{"fresh", fresh}, {"connected", connected}, {"listener", server}, {"udp", udp}, {"six", six}};
    int levels[] = {0, 1, 6, 17, 41, 255, 270, 99999};
    for (int i = 0; i < 5; i++)
        for (int l = 0; l < 8; l++)
            for (int name = -1; name < 90; name++) {
                char value[512] = "";
                socklen_t length = sizeof value;
                int rc = getsockopt(list[i].fd, levels[l], name, value, &length);
                /* SO_COOKIE and the like have values of their own: whether it works is what is compared. */
                printf("%s %d %d: %s\n", list[i].name, levels[l], name, rc ? strerrorname_np(errno) : "0");
            }
    for (int l = 0; l < 8; l++)
        for (int name = -1; name < 90; name++)
            for (int length = 0; length < 10; length += 3) {
                char value[16] = "";
                setsockopt(fresh, levels[l], name, value, length);
                setsockopt(udp, levels[l], name, value, length);
            }
    printf("still %s\n", name_of(connected, 1));
}

/* 9: far more than any window, both ways at once. */
static void *writer(void *p) {
    int fd = *(int *)p;
    char block[65536];
    for (int i = 0; i < 1600; i++) {
        memset(block, i, sizeof block);
        for (size_t n = 0; n < sizeof block;) {
            ssize_t r = write(fd, block + n, sizeof block - n);
            if (r <= 0) return (void *)1;
            n += r;
        }
    }
    shutdown(fd, SHUT_WR);
    return 0;
}

static void long_stream(void) {
    int fd = tcp();
    dial(fd, ORIGIN, 7007);
    write(fd, "e", 1);
    pthread_t thread;
    pthread_create(&thread, 0, writer, &fd);
    char block[65536];
    long total = 0, bad = 0;
    for (ssize_t n; (n = read(fd, block, sizeof block)) > 0; total += n)
        for (ssize_t i = 0; i < n; i += 4096) bad += (unsigned char)block[i] != (unsigned char)((total + i) / 65536);
    printf("echoed %ld bad %ld\n", total, bad);
}

/* 12: an edit from outside raises inotify. */
#include <sys/inotify.h>
static void watch(void) {
    int fd = inotify_init1(0);
    SAY(inotify_add_watch(fd, args[2], IN_CLOSE_WRITE));
    puts("ready"), fflush(stdout);
    char buffer[4096];
    ready(fd, POLLIN, 10000);
    ssize_t n = read(fd, buffer, sizeof buffer);
    struct inotify_event *e = (void *)buffer;
    printf("%s %x\n", n > 0 ? e->name : "nothing", n > 0 ? e->mask : 0);
}

/* 16: threads that end in the middle of a connect leave nothing at the supervisor. */
static void *end_in_connect(void *p) {
    int fd = (long)p % 2 ? tcp() : tcp_nonblocking(), ep = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLOUT};
    epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
    dial(fd, ORIGIN, 7007);
    close(ep);
    close(fd);
    return 0;
}

static void ending_threads(void) {
    for (int round = 0; round < 100; round++) {
        pthread_t list[20];
        for (long i = 0; i < 20; i++) pthread_create(&list[i], 0, end_in_connect, (void *)i);
        for (int i = 0; i < 20; i++) pthread_join(list[i], 0);
        if (round == 20) puts("warm"), fflush(stdout), sleep_ms(300);
    }
    int fd = dup(0);
    printf("next descriptor %d\n", fd);
    puts("over"), fflush(stdout);
    char c;
    read(0, &c, 1);
}

int main(int argc, char **argv) {
    args = argv;
    return run_case((struct test_case[]){{"blocked_accept", blocked_accept}, {"nonblocking_accept", nonblocking_accept}, {"bind_zero", bind_zero},
        {"all_options", all_options}, {"long_stream", long_stream}, {"watch", watch}, {"ending_threads", ending_threads}, {0}}, argc, argv);
}
