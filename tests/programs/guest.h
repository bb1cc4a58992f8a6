/* What the guest programs share. Each prints what it saw: the same natively and outsourced. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ORIGIN "10.77.0.2"
#define ORIGIN6 "fd77::2"
#define BLACKHOLE "10.77.0.99"

struct address {
    struct sockaddr_storage storage;
    socklen_t length;
};

static inline struct address to(const char *ip, int port) {
    struct address a = {0};
    struct sockaddr_in *v4 = (void *)&a.storage;
    struct sockaddr_in6 *v6 = (void *)&a.storage;
    if (strchr(ip, ':')) {
        *v6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons(port)};
        inet_pton(AF_INET6, ip, &v6->sin6_addr);
        a.length = sizeof *v6;
    } else {
        *v4 = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
        inet_pton(AF_INET, ip, &v4->sin_addr);
        a.length = sizeof *v4;
    }
    return a;
}

/* The result of a call by name: "0", "5", "EINPROGRESS". */
static inline const char *result(long rc) {
    static char text[8][64];
    static int turn;
    char *to = text[turn++ % 8];
    if (rc >= 0) snprintf(to, 64, "%ld", rc);
    else snprintf(to, 64, "%s", strerrorname_np(errno));
    return to;
}

#define SAY(call) (printf("%s = %s\n", #call, result(call)), fflush(stdout))

static inline int dial(int fd, const char *ip, int port) {
    struct address a = to(ip, port);
    return connect(fd, (void *)&a.storage, a.length);
}

static inline int tcp(void) { return socket(AF_INET, SOCK_STREAM, 0); }
static inline int tcp_nonblocking(void) { return socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0); }

static inline int option(int fd, int level, int name) {
    int value = -1;
    socklen_t length = sizeof value;
    return getsockopt(fd, level, name, &value, &length) < 0 ? -errno : value;
}

static inline const char *so_error(int fd) {
    int value = option(fd, SOL_SOCKET, SO_ERROR);
    return value ? strerrorname_np(value) : "0";
}

static inline int ready(int fd, int events, int ms) {
    struct pollfd p = {.fd = fd, .events = events};
    return poll(&p, 1, ms) < 0 ? -1 : p.revents;
}

static inline const char *name_of(int fd, int peer) {
    static char text[4][100];
    static int turn;
    char *out = text[turn++ % 4], ip[64];
    struct sockaddr_storage s = {0};
    socklen_t length = sizeof s;
    if ((peer ? getpeername : getsockname)(fd, (void *)&s, &length) < 0) return strerrorname_np(errno);
    if (s.ss_family == AF_INET) {
        struct sockaddr_in *v4 = (void *)&s;
        snprintf(out, 100, "%s %d", inet_ntop(AF_INET, &v4->sin_addr, ip, 64), ntohs(v4->sin_port));
    } else {
        struct sockaddr_in6 *v6 = (void *)&s;
        snprintf(out, 100, "%s %d", inet_ntop(AF_INET6, &v6->sin6_addr, ip, 64), ntohs(v6->sin6_port));
    }
    return out;
}

static inline int port_of(int fd) {
    struct sockaddr_storage s = {0};
    socklen_t length = sizeof s;
    getsockname(fd, (void *)&s, &length);
    return ntohs(((struct sockaddr_in *)&s)->sin_port);
}

/* Sends TEXT after the echo server's command byte and reads so much back. */
static inline const char *echo(int fd, const char *text) {
    static _Thread_local char out[4096];
    char send_[4096];
    size_t n = strlen(text), got = 0;
    snprintf(send_, sizeof send_, "e%s", text);
    if (send(fd, send_, n + 1, MSG_NOSIGNAL) < 0) return strerrorname_np(errno);
    while (got < n) {
        ready(fd, POLLIN, 5000);
        ssize_t r = recv(fd, out + got, sizeof out - 1 - got, 0);
        if (r < 0) return strerrorname_np(errno);
        if (r == 0) return "EOF";
        got += r;
    }
    out[got] = 0;
    return out;
}

static inline double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static inline void sleep_ms(int ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000L};
    nanosleep(&t, 0);
}

struct test_case {
    const char *name;
    void (*run)(void);
};

static inline int run_case(struct test_case *cases, int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    setvbuf(stdout, 0, _IOLBF, 0);
    for (; cases->name; cases++)
        if (argc > 1 && !strcmp(cases->name, argv[1])) return cases->run(), 0;
    fprintf(stderr, "no such case: %s\n", argc > 1 ? argv[1] : "");
    return 2;
}
