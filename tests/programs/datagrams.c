/* datagrams CASE: UDP as programs use it. The origin echoes on port 7007 of .2, .3 and ::2; nothing is on port 9. */
#include "guest.h"
#include <linux/errqueue.h>
#include <netinet/udp.h>

static int udp(int family) {
    int fd = socket(family, SOCK_DGRAM, 0);
    struct timeval limit = {5, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return fd;
}

static long send_to(int fd, const char *ip, int port, const void *data, size_t n) {
    struct address a = to(ip, port);
    return sendto(fd, data, n, 0, (void *)&a.storage, a.length);
}

static const char *from(struct sockaddr_storage *s) {
    static char text[100];
    char ip[64];
    if (s->ss_family == AF_INET) {
        struct sockaddr_in *v4 = (void *)s;
        snprintf(text, 100, "%s %d", inet_ntop(AF_INET, &v4->sin_addr, ip, 64), ntohs(v4->sin_port));
    } else {
        struct sockaddr_in6 *v6 = (void *)s;
        snprintf(text, 100, "%s %d", inet_ntop(AF_INET6, &v6->sin6_addr, ip, 64), ntohs(v6->sin6_port));
    }
    return text;
}

static void take(int fd) {
    char buffer[70000];
    struct sockaddr_storage s;
    socklen_t length = sizeof s;
    ssize_t n = recvfrom(fd, buffer, sizeof buffer - 1, 0, (void *)&s, &length);
    if (n < 0) {
        printf("recvfrom: %s\n", strerrorname_np(errno));
        return;
    }
    buffer[n] = 0;
    printf("%zd %.20s from %s\n", n, buffer, from(&s));
}

static void connected(void) {
    int fd = udp(AF_INET);
    SAY(dial(fd, ORIGIN, 7007));
    SAY(send(fd, "hello", 5, 0));
    take(fd);
    printf("peer %s, named %d\n", name_of(fd, 1), port_of(fd) != 0);
    SAY(send_to(fd, "10.77.0.3", 7007, "x", 1));
    take(fd);
    struct sockaddr none = {.sa_family = AF_UNSPEC};
    SAY(connect(fd, &none, sizeof none));
    SAY(send(fd, "x", 1, 0));
    SAY(dial(fd, "10.77.0.3", 7007));
    SAY(write(fd, "again", 5));
    take(fd);
    int six = udp(AF_INET6);
    SAY(dial(six, ORIGIN6, 7007));
    SAY(send(six, "six", 3, 0));
    take(six);
    int mapped = udp(AF_INET6);
    SAY(send_to(mapped, "::ffff:10.77.0.2", 7007, "mapped", 6));
    take(mapped);
    SAY(recv(fd, &none, 1, MSG_DONTWAIT));
}

static void unconnected(void) {
    int fd = udp(AF_INET);
    SAY(send_to(fd, ORIGIN, 7007, "one", 3));
    take(fd);
    SAY(send_to(fd, "10.77.0.3", 7007, "two", 3));
    take(fd);
    SAY(send_to(fd, "10.77.0.4", 7007, "three", 5));
    take(fd);
    /* One socket is one port, whoever it talks to. */
    char first[100] = "", second[100] = "";
    send_to(fd, ORIGIN, 7007, "who", 3);
    recv(fd, first, 99, 0);
    send_to(fd, "10.77.0.3", 7007, "who", 3);
    recv(fd, second, 99, 0);
    printf("the same source for both: %d\n", !strcmp(first, second));
}

static void many(void) {
    int list[200], bad = 0;
    char text[32], got[64];
    for (int i = 0; i < 200; i++) list[i] = udp(i % 2 ? AF_INET6 : AF_INET);
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < 200; i++) {
            int n = snprintf(text, 32, "%d/%d", i, round);
            send_to(list[i], i % 2 ? ORIGIN6 : i % 3 ? ORIGIN : "10.77.0.3", 7007, text, n);
            ssize_t r = recv(list[i], got, 64, 0);
            if (r != n || memcmp(got, text, n)) bad++;
        }
    }
    printf("bad %d\n", bad);
}

static void refused(void) {
    int fd = udp(AF_INET);
    dial(fd, ORIGIN, 9);
    SAY(send(fd, "x", 1, 0));
    SAY(recv(fd, &fd, 0, 0));
    int six = udp(AF_INET6);
    dial(six, ORIGIN6, 9);
    SAY(send(six, "x", 1, 0));
    SAY(recv(six, &six, 0, 0));
    /* With the error queue: which packet, and who said so. */
    int q = udp(AF_INET), one = 1;
    setsockopt(q, IPPROTO_IP, IP_RECVERR, &one, sizeof one);
    SAY(send_to(q, ORIGIN, 9, "lost", 4));
    printf("events %x\n", ready(q, POLLIN, 3000));
    char buffer[100] = "", control[512];
    struct sockaddr_in peer;
    struct iovec io = {buffer, 100};
    struct msghdr m = {.msg_name = &peer, .msg_namelen = sizeof peer, .msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = 512};
    ssize_t n = recvmsg(q, &m, MSG_ERRQUEUE);
    printf("%zd %s to %s %d\n", n, buffer, inet_ntoa(peer.sin_addr), ntohs(peer.sin_port));
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); n >= 0 && c; c = CMSG_NXTHDR(&m, c)) {
        if (c->cmsg_type != IP_RECVERR) continue;
        struct sock_extended_err *e = (void *)CMSG_DATA(c);
        printf("%s origin %d type %d code %d\n", strerrorname_np(e->ee_errno), e->ee_origin, e->ee_type, e->ee_code);
    }
    /* And then it works on. */
    send_to(q, ORIGIN, 7007, "next", 4);
    int again = recv(q, buffer, 100, 0);
    if (again < 0) again = recv(q, buffer, 100, 0);
    printf("%d %s\n", again, buffer);
}

static void sizes(void) {
    static char data[70000], got[70000];
    for (int i = 0; i < 70000; i++) data[i] = i * 31 % 251;
    int fd = udp(AF_INET), six = udp(AF_INET6);
    size_t list[] = {0, 1, 1472, 1473, 8000, 40000, 65000, 65507};
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        SAY(send_to(fd, ORIGIN, 7007, data, list[i]));
        ssize_t n = recv(fd, got, sizeof got, 0);
        printf("%zd %d\n", n, n >= 0 && !memcmp(got, data, n));
        send_to(six, ORIGIN6, 7007, data, list[i]);
        n = recv(six, got, sizeof got, 0);
        printf("%zd %d\n", n, n >= 0 && !memcmp(got, data, n));
    }
    SAY(send_to(fd, ORIGIN, 7007, data, 65508));
    SAY(send_to(fd, ORIGIN, 7007, data, 70000));
    /* A short buffer: the rest is lost and MSG_TRUNC says so. */
    send_to(fd, ORIGIN, 7007, data, 1000);
    SAY(recv(fd, got, 10, MSG_TRUNC));
}

/* IPV6_MTU makes the program's own kernel cut the datagram in fragments. */
static void fragments(void) {
    static char data[20000], got[20000];
    for (int i = 0; i < 20000; i++) data[i] = i * 31 % 251;
    int six = udp(AF_INET6), mtu = 1280;
    SAY(setsockopt(six, IPPROTO_IPV6, IPV6_MTU, &mtu, sizeof mtu));
    for (int i = 0; i < 5; i++) {
        send_to(six, ORIGIN6, 7007, data, 20000 - i);
        ssize_t n = recv(six, got, sizeof got, 0);
        printf("%zd %d\n", n, n >= 0 && !memcmp(got, data, n));
    }
}

static void batches(void) {
    int fd = udp(AF_INET);
    dial(fd, ORIGIN, 7007);
    struct mmsghdr m[32] = {0};
    struct iovec io[32];
    char text[32][100], got[32][100];
    for (int i = 0; i < 32; i++) {
        io[i] = (struct iovec){text[i], snprintf(text[i], 100, "message %d", i)};
        m[i].msg_hdr = (struct msghdr){.msg_iov = &io[i], .msg_iovlen = 1};
    }
    SAY(sendmmsg(fd, m, 32, 0));
    for (int i = 0; i < 32; i++) io[i] = (struct iovec){got[i], 100};
    int n = 0, bad = 0;
    while (n < 32) {
        int r = recvmmsg(fd, m, 32 - n, MSG_WAITFORONE, 0);
        if (r <= 0) break;
        for (int i = 0; i < r; i++, n++) bad += strncmp(got[i], text[n], m[i].msg_len) != 0;
    }
    printf("received %d bad %d\n", n, bad);
    /* One send, ten datagrams (UDP_SEGMENT). */
    char data[10000], small[2000];
    memset(data, 'g', sizeof data);
    int size = 1000;
    SAY(setsockopt(fd, IPPROTO_UDP, UDP_SEGMENT, &size, sizeof size));
    SAY(send(fd, data, sizeof data, 0));
    for (n = 0; n < 10; n++)
        if (recv(fd, small, sizeof small, 0) != 1000) break;
    printf("segments %d\n", n);
}

static void inside(void) {
    int server = udp(AF_INET), client = udp(AF_INET);
    struct address a = to("127.0.0.1", 0);
    bind(server, (void *)&a.storage, a.length);
    SAY(send_to(client, "127.0.0.1", port_of(server), "in", 2));
    char buffer[10];
    SAY(recv(server, buffer, 10, 0));
    int closed = udp(AF_INET);
    dial(closed, "127.0.0.1", 9);
    SAY(send(closed, "x", 1, 0));
    SAY(send(closed, "x", 1, 0));
}

static void ping_pong(void) {
    int fd = udp(AF_INET), bad = 0;
    dial(fd, ORIGIN, 7007);
    char text[32], got[64];
    for (int i = 0; i < 3000; i++) {
        int n = snprintf(text, 32, "%d", i);
        send(fd, text, n, 0);
        if (recv(fd, got, 64, 0) != n || memcmp(got, text, n)) bad++;
    }
    printf("bad %d\n", bad);
}

static void packet_info(void) {
    int fd = udp(AF_INET), one = 1;
    setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &one, sizeof one);
    setsockopt(fd, IPPROTO_IP, IP_RECVTTL, &one, sizeof one);
    send_to(fd, ORIGIN, 7007, "info", 4);
    char buffer[100], control[512];
    struct iovec io = {buffer, 100};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = 512};
    SAY(recvmsg(fd, &m, 0));
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) printf("control %d\n", c->cmsg_type);
}

int main(int argc, char **argv) {
    return run_case((struct test_case[]){{"connected", connected}, {"unconnected", unconnected}, {"many", many}, {"refused", refused},
        {"sizes", sizes}, {"fragments", fragments}, {"batches", batches}, {"inside", inside}, {"ping_pong", ping_pong},
        {"packet_info", packet_info}, {0}}, argc, argv);
}
