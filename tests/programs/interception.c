/* interception CASE: what a program may do around connect. Echo server on port 7007 of the origin. */
#include "guest.h"

static void nonblocking(void) {
    int fd = tcp_nonblocking();
    SAY(dial(fd, ORIGIN, 7007));
    printf("events %x\n", ready(fd, POLLOUT, 5000));
    printf("SO_ERROR %s\n", so_error(fd));
    SAY(dial(fd, ORIGIN, 7007));
    SAY(dial(fd, ORIGIN, 7007));
    printf("peer %s, %s\n", name_of(fd, 1), echo(fd, "hello"));
    printf("flags %x\n", fcntl(fd, F_GETFL));
    char c;
    SAY(recv(fd, &c, 1, 0));
    fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0);
    SAY(dial(fd, ORIGIN6, 7007));
    printf("events %x, %s\n", ready(fd, POLLOUT, 5000), so_error(fd));
    printf("peer %s, %s\n", name_of(fd, 1), echo(fd, "hello"));
}

static void pending(void) {
    int fd = tcp_nonblocking();
    SAY(dial(fd, BLACKHOLE, 80));
    SAY(dial(fd, BLACKHOLE, 80));
    printf("events %x\n", ready(fd, POLLOUT | POLLIN, 200));
    printf("SO_ERROR %s, peer %s\n", so_error(fd), name_of(fd, 1));
    char c;
    SAY(recv(fd, &c, 1, 0));
    SAY(send(fd, "x", 1, MSG_NOSIGNAL));
    int other = tcp_nonblocking();
    SAY(dial(other, ORIGIN, 7007));
    printf("another is not held up: events %x, %s\n", ready(other, POLLOUT, 5000), echo(other, "other"));
    SAY(shutdown(fd, SHUT_RDWR));
    printf("events %x\n", ready(fd, POLLOUT | POLLIN, 1000));
    SAY(close(fd));
}

static void errors(void) {
    struct { const char *ip; int port; } list[] = {{ORIGIN, 9}, {"192.0.2.1", 80}, {"10.78.0.1", 80}, {ORIGIN6, 9}, {"2001:db8::1", 80}};
    for (int i = 0; i < 5; i++) {
        int family = strchr(list[i].ip, ':') ? AF_INET6 : AF_INET;
        int fd = socket(family, SOCK_STREAM, 0);
        printf("%s %d blocking %s", list[i].ip, list[i].port, result(dial(fd, list[i].ip, list[i].port)));
        printf(", SO_ERROR %s\n", so_error(fd));
        fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK, 0);
        int rc = dial(fd, list[i].ip, list[i].port);
        printf("%s %d non-blocking %s", list[i].ip, list[i].port, result(rc));
        printf(" events %x", ready(fd, POLLOUT | POLLIN, 5000));
        printf(", SO_ERROR %s", so_error(fd));
        printf(", then %s\n", so_error(fd));
    }
}

/* No neighbour answers: EHOSTUNREACH comes seconds later, and TCP_USER_TIMEOUT makes ETIMEDOUT. */
static void late_errors(void) {
    int a = tcp_nonblocking(), b = tcp_nonblocking(), limit = 1000;
    setsockopt(b, IPPROTO_TCP, TCP_USER_TIMEOUT, &limit, sizeof limit);
    SAY(dial(a, "10.77.0.77", 80));
    SAY(dial(b, BLACKHOLE, 80));
    int events = ready(b, POLLOUT, 15000);
    printf("events %x, SO_ERROR %s\n", events, so_error(b));
    events = ready(a, POLLOUT, 15000);
    printf("events %x, SO_ERROR %s\n", events, so_error(a));
    int c = tcp();
    SAY(dial(c, "10.77.0.77", 80));
    c = tcp();
    setsockopt(c, IPPROTO_TCP, TCP_USER_TIMEOUT, &limit, sizeof limit);
    SAY(dial(c, BLACKHOLE, 80));
}

static void add(int ep, int fd, uint32_t events, uint64_t data) {
    struct epoll_event e = {.events = events, .data.u64 = data};
    if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e)) printf("add: %s\n", strerrorname_np(errno));
}

static void wait_print(int ep, const char *what, int ms) {
    struct epoll_event e[8];
    int n = epoll_wait(ep, e, 8, ms);
    printf("%s:", what);
    for (int i = 0; i < n; i++) printf(" %x/%llx", e[i].events, (unsigned long long)e[i].data.u64);
    puts(n ? "" : " none");
}

static void epoll_modes(void) {
    uint32_t modes[] = {0, EPOLLET, EPOLLONESHOT, EPOLLET | EPOLLONESHOT, EPOLLRDHUP, EPOLLEXCLUSIVE};
    for (int i = 0; i < 6; i++) {
        printf("mode %x\n", modes[i]);
        int ep = epoll_create1(EPOLL_CLOEXEC), fd = tcp_nonblocking();
        add(ep, fd, EPOLLIN | EPOLLOUT | modes[i], 0x123456789abcdef0ull + i);
        SAY(dial(fd, ORIGIN, 7007));
        /* A fresh socket reports HUP before the connect; what matters is that OUT comes after it. */
        struct epoll_event e;
        double end = now() + 5;
        int seen = 0;
        while (now() < end && !seen)
            if (epoll_wait(ep, &e, 1, 5000) == 1 && e.events == EPOLLOUT) seen = 1;
        printf("connected %d data %llx\n", seen, (unsigned long long)e.data.u64);
        if (modes[i] & EPOLLONESHOT) {
            wait_print(ep, "disarmed", 100);
            e = (struct epoll_event){.events = EPOLLIN | modes[i], .data.u64 = 7};
            SAY(epoll_ctl(ep, EPOLL_CTL_MOD, fd, &e));
        } else if (modes[i] & EPOLLET) {
            wait_print(ep, "no second edge", 100);
        }
        send(fd, "eabc", 4, 0);
        ready(fd, POLLIN, 5000);
        wait_print(ep, "readable", 1000);
        char buffer[10];
        recv(fd, buffer, 10, 0);
        struct epoll_event again = {.events = EPOLLIN};
        SAY(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &again));
        SAY(epoll_ctl(ep, EPOLL_CTL_DEL, fd, 0));
        SAY(epoll_ctl(ep, EPOLL_CTL_DEL, fd, 0));
        wait_print(ep, "deleted", 50);
        add(ep, fd, EPOLLOUT, 9);
        close(fd);
        wait_print(ep, "closed", 50);
        close(ep);
    }
}

/* One socket in two epolls under two descriptors; a set within a set. */
static void epoll_many(void) {
    int a = epoll_create1(0), b = epoll_create1(0), fd = tcp_nonblocking(), twin = dup(fd);
    add(a, fd, EPOLLOUT, 1);
    add(a, twin, EPOLLOUT, 2);
    add(b, fd, EPOLLIN, 3);
    add(b, a, EPOLLIN, 4);
    SAY(dial(twin, ORIGIN, 7007));
    ready(fd, POLLOUT, 5000);
    struct epoll_event e[8];
    int n = epoll_wait(a, e, 8, 5000), sum = 0;
    for (int i = 0; i < n; i++) sum += e[i].data.u64 * (e[i].events == EPOLLOUT);
    printf("in a: %d, sum %d\n", n, sum);
    wait_print(b, "nested", 1000);
    send(fd, "ex", 2, 0);
    ready(twin, POLLIN, 5000);
    n = epoll_wait(b, e, 8, 1000);
    printf("in b: %d\n", n);
    close(fd);
    n = epoll_wait(a, e, 8, 0);
    printf("after the close of one name: %d\n", n);
    close(twin);
    n = epoll_wait(a, e, 8, 0);
    printf("after the close of both: %d\n", n);
}

static void *wait_in_thread(void *p) {
    struct epoll_event e;
    int n;
    do n = epoll_wait(*(int *)p, &e, 1, 5000);
    while (n == 1 && e.events != EPOLLOUT);
    return (void *)(long)(n == 1 ? e.data.u64 : 999);
}

/* epoll_wait is blocked in another thread while the descriptor is swapped. */
static void epoll_blocked(void) {
    int ep = epoll_create1(0), fd = tcp_nonblocking();
    pthread_t thread;
    add(ep, fd, EPOLLOUT | EPOLLET, 42);
    pthread_create(&thread, 0, wait_in_thread, &ep);
    sleep_ms(100);
    SAY(dial(fd, ORIGIN, 7007));
    void *got;
    pthread_join(thread, &got);
    printf("woken with %ld\n", (long)got);
}

static void duplicates(void) {
    int fd = tcp(), twin = dup(fd), far = dup2(fd, 77), cloexec = fcntl(fd, F_DUPFD_CLOEXEC, 100);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    int alone = tcp();
    SAY(dial(far, ORIGIN, 7007));
    printf("%s", echo(fd, "one "));
    write(twin, "two ", 4);
    char buffer[10] = "";
    ready(cloexec, POLLIN, 5000);
    read(cloexec, buffer, 4);
    printf("%s\n", buffer);
    printf("cloexec %d %d %d %d\n", fcntl(fd, F_GETFD), fcntl(twin, F_GETFD), fcntl(far, F_GETFD), fcntl(cloexec, F_GETFD));
    fcntl(twin, F_SETFL, O_NONBLOCK);
    printf("shared flags %x %x\n", fcntl(fd, F_GETFL), fcntl(far, F_GETFL));
    close(fd), close(far), close(cloexec);
    fcntl(twin, F_SETFL, 0);
    write(twin, "last", 4);
    memset(buffer, 0, 10);
    read(twin, buffer, 4);
    printf("%s; another socket: %s\n", buffer, name_of(alone, 1));
}

static void fork_after(void) {
    int fd = tcp();
    SAY(dial(fd, ORIGIN, 7007));
    write(fd, "e", 1);
    if (!fork()) {
        write(fd, "from child", 10);
        _exit(0);
    }
    int status;
    wait(&status);
    char buffer[20] = "";
    recv(fd, buffer, 10, MSG_WAITALL);
    printf("%s\n", buffer);
}

/* The socket is shared with a child before it is connected: both see the connection. */
static void fork_before(void) {
    int fd = tcp(), pipes[2];
    pipe(pipes);
    if (!fork()) {
        char c;
        close(pipes[1]);
        read(pipes[0], &c, 1);
        printf("child: %s\n", echo(fd, "hello"));
        _exit(0);
    }
    SAY(dial(fd, ORIGIN, 7007));
    close(pipes[1]);
    wait(0);
}

/* vfork, CLONE_FILES and exec: the child connects with the parent's table, or hands a socket on. */
static void exec_keeps(void) {
    int fd = tcp(), closed = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    dial(fd, ORIGIN, 7007);
    dial(closed, ORIGIN, 7007);
    char a[10], b[10];
    snprintf(a, 10, "%d", fd), snprintf(b, 10, "%d", closed);
    execl("/proc/self/exe", "interception", "exec_child", a, b, NULL);
}

static char **arguments;
static void exec_child(void) {
    int fd = atoi(arguments[2]), closed = atoi(arguments[3]);
    printf("%s\n", echo(fd, "after exec"));
    SAY(fcntl(closed, F_GETFD));
}

static void *one_thread(void *p) {
    long id = (long)p;
    char text[32];
    for (int i = 0; i < 20; i++) {
        int fd = tcp();
        snprintf(text, sizeof text, "thread %ld round %d", id, i);
        if (dial(fd, ORIGIN, 7007)) return (void *)(long)errno;
        if (strcmp(echo(fd, text), text)) return (void *)-1L;
        close(fd);
    }
    return 0;
}

static void threads(void) {
    pthread_t list[16];
    long bad = 0;
    for (long i = 0; i < 16; i++) pthread_create(&list[i], 0, one_thread, (void *)i);
    for (int i = 0; i < 16; i++) {
        void *got;
        pthread_join(list[i], &got);
        bad += (long)got;
    }
    printf("bad %ld\n", bad);
}

static int pass(int channel, int fd) {
    struct iovec io = {"x", 1};
    union { char buffer[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = {0};
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control.buffer, .msg_controllen = sizeof control.buffer};
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    *c = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
    memcpy(CMSG_DATA(c), &fd, sizeof fd);
    return sendmsg(channel, &m, 0);
}

static int take(int channel) {
    char byte;
    struct iovec io = {&byte, 1};
    union { char buffer[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control;
    struct msghdr m = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control.buffer, .msg_controllen = sizeof control.buffer};
    int fd = -1;
    if (recvmsg(channel, &m, 0) > 0 && CMSG_FIRSTHDR(&m)) memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
    return fd;
}

static void passing(void) {
    int pair[2];
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    if (!fork()) {
        int connected = take(pair[1]);
        printf("child: %s\n", echo(connected, "passed connected"));
        int fresh = take(pair[1]);
        printf("child: connect %s, ", result(dial(fresh, ORIGIN, 7007)));
        printf("%s\n", echo(fresh, "passed fresh"));
        pass(pair[1], fresh);
        _exit(0);
    }
    int connected = tcp(), fresh = tcp();
    dial(connected, ORIGIN, 7007);
    pass(pair[0], connected);
    pass(pair[0], fresh);
    close(fresh);
    int back = take(pair[0]);
    write(back, "back", 4);
    char buffer[5] = "";
    recv(back, buffer, 4, MSG_WAITALL);
    printf("parent: %s\n", buffer);
    wait(0);
}

static volatile int alarms;
static void on_alarm(int signal) { alarms++; }

static void set_alarm(int flags, int first, int every) {
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = flags};
    sigaction(SIGALRM, &action, 0);
    struct itimerval timer = {{every / 1000, every % 1000 * 1000}, {first / 1000, first % 1000 * 1000}};
    setitimer(ITIMER_REAL, &timer, 0);
}

static void interrupted(void) {
    int fd = tcp();
    set_alarm(0, 200, 0);
    SAY(dial(fd, BLACKHOLE, 80));
    printf("alarms %d\n", alarms);
    set_alarm(0, 200, 0);
    SAY(dial(fd, BLACKHOLE, 80));
    printf("alarms %d, SO_ERROR %s\n", alarms, so_error(fd));
    close(fd);
    /* With SA_RESTART the call goes on until its own end. */
    alarms = 0;
    fd = tcp();
    int limit = 1500;
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &limit, sizeof limit);
    set_alarm(SA_RESTART, 100, 100);
    SAY(dial(fd, BLACKHOLE, 80));
    printf("alarms more than one: %d\n", alarms > 1);
    set_alarm(0, 0, 0);
    /* The interrupted connect goes on in the background and can be waited for. */
    fd = tcp();
    SAY(dial(fd, ORIGIN, 7007));
    printf("%s\n", echo(fd, "still works"));
    /* A storm of signals around connects that succeed: no call fails but by EINTR, nothing leaks. */
    set_alarm(SA_RESTART, 1, 1);
    int bad = 0, before = dup(0);
    close(before);
    for (int i = 0; i < 300; i++) {
        fd = tcp();
        if (dial(fd, ORIGIN, 7007)) bad++, printf("%s\n", strerrorname_np(errno));
        close(fd);
    }
    set_alarm(0, 0, 0);
    int after = dup(0);
    printf("bad %d leaked %d\n", bad, after - before);
}

static void interrupted_storm(void) {
    /* Without SA_RESTART: EINTR, and then the connection is there (poll) or under way (EALREADY, EISCONN). */
    int bad = 0, before = dup(0);
    close(before);
    set_alarm(0, 1, 1);
    for (int i = 0; i < 300; i++) {
        int fd = tcp();
        int rc = dial(fd, ORIGIN, 7007);
        if (rc && errno == EINTR) {
            while ((rc = ready(fd, POLLOUT, 3000)) < 0 && errno == EINTR);
            if (rc != POLLOUT || option(fd, SOL_SOCKET, SO_ERROR)) bad++;
        } else if (rc) {
            bad++;
        }
        close(fd);
    }
    set_alarm(0, 0, 0);
    int after = dup(0);
    /* A signal in the moment before the supervisor has the call ends it unbegun: see docs/semantics.md. */
    fprintf(stderr, "not begun %d\n", bad);
    printf("few %d leaked %d\n", bad < 60, after - before);
}

static void timeouts(void) {
    int fd = tcp();
    struct timeval limit = {0, 300000}, got = {0};
    socklen_t length = sizeof got;
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    double start = now();
    SAY(dial(fd, BLACKHOLE, 80));
    double took = now() - start;
    printf("in time: %d\n", took > 0.25 && took < 1.0);
    SAY(dial(fd, BLACKHOLE, 80));
    close(fd);
    fd = tcp();
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    SAY(dial(fd, ORIGIN, 7007));
    getsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &got, &length);
    printf("carried over: %ld\n", (long)got.tv_usec);
    char c;
    start = now();
    SAY(recv(fd, &c, 1, 0));
    took = now() - start;
    printf("in time: %d\n", took > 0.25 && took < 1.0);
}

static struct { int level, name, value; const char *text; } options[] = {
    {SOL_SOCKET, SO_KEEPALIVE, 1, "SO_KEEPALIVE"}, {SOL_SOCKET, SO_RCVBUF, 50000, "SO_RCVBUF"}, {SOL_SOCKET, SO_SNDBUF, 60000, "SO_SNDBUF"},
    {SOL_SOCKET, SO_REUSEADDR, 1, "SO_REUSEADDR"}, {SOL_SOCKET, SO_PRIORITY, 5, "SO_PRIORITY"}, {SOL_SOCKET, SO_OOBINLINE, 1, "SO_OOBINLINE"},
    {SOL_SOCKET, SO_RCVLOWAT, 3, "SO_RCVLOWAT"}, {IPPROTO_TCP, TCP_NODELAY, 1, "TCP_NODELAY"}, {IPPROTO_TCP, TCP_KEEPIDLE, 77, "TCP_KEEPIDLE"},
    {IPPROTO_TCP, TCP_KEEPINTVL, 11, "TCP_KEEPINTVL"}, {IPPROTO_TCP, TCP_KEEPCNT, 4, "TCP_KEEPCNT"}, {IPPROTO_TCP, TCP_USER_TIMEOUT, 12345, "TCP_USER_TIMEOUT"},
    {IPPROTO_TCP, TCP_SYNCNT, 3, "TCP_SYNCNT"}, {IPPROTO_TCP, TCP_LINGER2, 30, "TCP_LINGER2"}, {IPPROTO_TCP, TCP_NOTSENT_LOWAT, 16384, "TCP_NOTSENT_LOWAT"},
    {IPPROTO_IP, IP_TOS, 0x10, "IP_TOS"}, {IPPROTO_IP, IP_TTL, 33, "IP_TTL"}, {IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT, "IP_MTU_DISCOVER"},
    {IPPROTO_IP, IP_RECVERR, 1, "IP_RECVERR"}};

static void print_options(int fd) {
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        printf("%s %d\n", options[i].text, option(fd, options[i].level, options[i].name));
    struct linger linger;
    socklen_t length = sizeof linger;
    getsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, &length);
    printf("SO_LINGER %d %d\n", linger.l_onoff, linger.l_linger);
    char text[32] = "";
    length = sizeof text;
    getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, text, &length);
    printf("TCP_CONGESTION %s\n", text);
    printf("SO_TYPE %d SO_DOMAIN %d SO_PROTOCOL %d SO_ACCEPTCONN %d\n", option(fd, SOL_SOCKET, SO_TYPE), option(fd, SOL_SOCKET, SO_DOMAIN),
           option(fd, SOL_SOCKET, SO_PROTOCOL), option(fd, SOL_SOCKET, SO_ACCEPTCONN));
}

static void set_options(int fd) {
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        if (setsockopt(fd, options[i].level, options[i].name, &options[i].value, sizeof(int)))
            printf("set %s: %s\n", options[i].text, strerrorname_np(errno));
    struct linger linger = {1, 5};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
}

static void options_before(void) {
    int fd = tcp();
    set_options(fd);
    SAY(dial(fd, ORIGIN, 7007));
    print_options(fd);
    int v6 = socket(AF_INET6, SOCK_STREAM, 0), value = 0x20, hops = 44;
    setsockopt(v6, IPPROTO_IPV6, IPV6_TCLASS, &value, sizeof value);
    setsockopt(v6, IPPROTO_IPV6, IPV6_UNICAST_HOPS, &hops, sizeof hops);
    SAY(dial(v6, ORIGIN6, 7007));
    printf("IPV6_TCLASS %d IPV6_UNICAST_HOPS %d\n", option(v6, IPPROTO_IPV6, IPV6_TCLASS), option(v6, IPPROTO_IPV6, IPV6_UNICAST_HOPS));
}

static void options_after(void) {
    int fd = tcp();
    SAY(dial(fd, ORIGIN, 7007));
    set_options(fd);
    print_options(fd);
    int n = -1;
    send(fd, "e12345", 6, 0);
    while (ready(fd, POLLIN, 5000), ioctl(fd, FIONREAD, &n), n < 5) sleep_ms(5);
    printf("FIONREAD %d\n", n);
    char buffer[10] = "";
    printf("peek %s", result(recv(fd, buffer, 10, MSG_PEEK)));
    printf(" %s\n", buffer);
    recv(fd, buffer, 10, 0);
    sleep_ms(50);
    ioctl(fd, SIOCOUTQ, &n);
    printf("SIOCOUTQ %d\n", n);
    struct tcp_info info;
    socklen_t length = sizeof info;
    getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length);
    printf("TCP_INFO state %d\n", info.tcpi_state);
}

static void options_on_listener(void) {
    int fd = tcp(), client = tcp();
    set_options(fd);
    struct address a = to("127.0.0.1", 0);
    bind(fd, (void *)&a.storage, a.length);
    SAY(listen(fd, 5));
    print_options(fd);
    SAY(dial(client, "127.0.0.1", port_of(fd)));
    int accepted = accept(fd, 0, 0);
    print_options(accepted);
}

static void half_close(void) {
    char buffer[100] = "";
    int fd = tcp();
    dial(fd, ORIGIN, 7007);
    /* We close first: it answers after our EOF. */
    write(fd, "gabcdef", 7);
    SAY(shutdown(fd, SHUT_WR));
    SAY(write(fd, "x", 1));
    read(fd, buffer, 100);
    printf("%s", buffer);
    SAY(read(fd, buffer, 100));
    close(fd);
    /* It closes first: we go on writing. */
    fd = tcp();
    dial(fd, ORIGIN, 7007);
    write(fd, "h", 1);
    memset(buffer, 0, 100);
    recv(fd, buffer, 4, MSG_WAITALL);
    printf("%s", buffer);
    SAY(read(fd, buffer, 100));
    SAY(write(fd, "more", 4));
    printf("events %x\n", ready(fd, POLLIN | POLLOUT | POLLRDHUP, 1000));
    SAY(shutdown(fd, SHUT_WR));
    sleep_ms(200);
    printf("events %x\n", ready(fd, POLLIN | POLLOUT | POLLRDHUP, 1000));
    SAY(shutdown(fd, SHUT_RD));
    /* A reset. */
    fd = tcp();
    dial(fd, ORIGIN, 7007);
    write(fd, "r", 1);
    SAY(recv(fd, buffer, 1, 0));
    SAY(recv(fd, buffer, 1, 0));
    SAY(send(fd, "x", 1, MSG_NOSIGNAL));
    printf("peer %s\n", name_of(fd, 1));
}

/* The peer sees what getsockname says; a port bound before connect is the port outside. */
static void bound(void) {
    char buffer[100] = "";
    int fd = tcp(), one = 1;
    dial(fd, ORIGIN, 7007);
    write(fd, "a", 1);
    read(fd, buffer, 100);
    char *mine = strdup(name_of(fd, 0));
    printf("seen as it is named: %d\n", !strncmp(buffer, mine, strlen(mine)));
    struct address a = to("0.0.0.0", 5555);
    fd = tcp();
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    SAY(bind(fd, (void *)&a.storage, a.length));
    printf("before %s\n", name_of(fd, 0));
    SAY(dial(fd, ORIGIN, 7007));
    printf("port %d\n", port_of(fd));
    write(fd, "a", 1);
    memset(buffer, 0, 100);
    read(fd, buffer, 100);
    printf("seen as %s", buffer);
    /* bind(0): the port named before the connect is the port outside. */
    fd = tcp();
    a = to("0.0.0.0", 0);
    SAY(bind(fd, (void *)&a.storage, a.length));
    int port = port_of(fd);
    SAY(dial(fd, ORIGIN, 7007));
    write(fd, "a", 1);
    memset(buffer, 0, 100);
    read(fd, buffer, 100);
    printf("same port: %d %d\n", port == port_of(fd), port == atoi(strchr(buffer, ' ')));
    a = to("0.0.0.0", 6666);
    int first = tcp(), second = tcp();
    SAY(bind(first, (void *)&a.storage, a.length));
    SAY(listen(first, 1));
    SAY(bind(second, (void *)&a.storage, a.length));
    a = to("10.77.0.88", 0);
    SAY(bind(second, (void *)&a.storage, a.length));
}

static void mapped(void) {
    int fd = socket(AF_INET6, SOCK_STREAM, 0), only = socket(AF_INET6, SOCK_STREAM, 0), one = 1;
    SAY(dial(fd, "::ffff:10.77.0.2", 7007));
    printf("peer %s, %s\n", name_of(fd, 1), echo(fd, "mapped"));
    setsockopt(only, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
    SAY(dial(only, "::ffff:10.77.0.2", 7007));
    SAY(dial(only, ORIGIN6, 7007));
    fd = socket(AF_INET6, SOCK_STREAM, 0);
    SAY(dial(fd, "::ffff:10.77.0.2", 9));
}

static void again(void) {
    int fd = tcp();
    SAY(dial(fd, ORIGIN, 9));
    SAY(dial(fd, ORIGIN, 7007));
    printf("%s\n", echo(fd, "after a refusal"));
    SAY(dial(fd, ORIGIN, 7007));
    struct sockaddr none = {.sa_family = AF_UNSPEC};
    SAY(connect(fd, &none, sizeof none));
    printf("peer %s\n", name_of(fd, 1));
    SAY(dial(fd, ORIGIN, 7007));
    printf("%s\n", echo(fd, "after AF_UNSPEC"));
    /* Inside after outside, on one socket. */
    int server = tcp();
    struct address a = to("127.0.0.1", 0);
    bind(server, (void *)&a.storage, a.length);
    listen(server, 5);
    connect(fd, &none, sizeof none);
    SAY(dial(fd, "127.0.0.1", port_of(server)));
}

static void bad_arguments(void) {
    int fd = tcp(), v6 = socket(AF_INET6, SOCK_STREAM, 0), file = open("/dev/null", O_RDWR);
    struct address a = to(ORIGIN, 7007), b = to(ORIGIN6, 7007);
    SAY(connect(-1, (void *)&a.storage, a.length));
    SAY(connect(file, (void *)&a.storage, a.length));
    SAY(connect(fd, (void *)8, a.length));
    SAY(connect(fd, (void *)&a.storage, 4));
    SAY(connect(fd, (void *)&a.storage, 0));
    SAY(connect(fd, (void *)&a.storage, 5000));
    SAY(connect(fd, (void *)&a.storage, -1));
    SAY(connect(fd, (void *)&b.storage, b.length));
    SAY(connect(v6, (void *)&a.storage, a.length));
    SAY(connect(v6, (void *)&b.storage, 20));
    SAY(listen(-1, 5));
    SAY(listen(file, 5));
    int udp = socket(AF_INET, SOCK_DGRAM, 0);
    SAY(listen(udp, 5));
    int listener = tcp();
    SAY(listen(listener, 5));
    SAY(dial(listener, ORIGIN, 7007));
    SAY(bind(fd, (void *)8, 16));
    SAY(bind(fd, (void *)&a.storage, 3));
    SAY(getsockname(fd, (void *)8, (void *)8));
    SAY(getsockname(file, 0, 0));
    SAY(getpeername(fd, 0, 0));
    SAY(dial(fd, ORIGIN, 7007));
    SAY(getpeername(fd, (void *)8, (void *)8));
    printf("%s\n", echo(fd, "after all that"));
    SAY(listen(fd, 5));
    a = to("0.0.0.0", 0);
    SAY(bind(fd, (void *)&a.storage, a.length));
    /* Truncated names. */
    struct sockaddr_in name;
    socklen_t length = 4;
    memset(&name, 0xff, sizeof name);
    SAY(getpeername(fd, (void *)&name, &length));
    printf("length %u, port untouched after it: %x\n", length, name.sin_addr.s_addr);
}

static void inside(void) {
    int server = tcp(), one = 1;
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct address a = to("0.0.0.0", 0);
    SAY(bind(server, (void *)&a.storage, a.length));
    SAY(listen(server, 10));
    int port = port_of(server), client = tcp();
    printf("named %d\n", port != 0);
    SAY(dial(client, "127.0.0.1", port));
    struct sockaddr_in peer;
    socklen_t length = sizeof peer;
    int accepted = accept4(server, (void *)&peer, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
    printf("peer agrees %d, flags %x %d\n", ntohs(peer.sin_port) == port_of(client), fcntl(accepted, F_GETFL), fcntl(accepted, F_GETFD));
    printf("%d %d\n", !strcmp(name_of(accepted, 1), name_of(client, 0)), !strcmp(name_of(client, 1), name_of(accepted, 0)));
    write(client, "x", 1);
    char c = 0;
    ready(accepted, POLLIN, 1000);
    SAY(read(accepted, &c, 1));
    SAY(dial(tcp(), "127.0.0.1", 1));
    SAY(dial(tcp(), "127.3.2.1", port));
    int v6 = socket(AF_INET6, SOCK_STREAM, 0);
    a = to("::1", 0);
    SAY(bind(v6, (void *)&a.storage, a.length));
    SAY(listen(v6, 5));
    int client6 = socket(AF_INET6, SOCK_STREAM, 0);
    SAY(dial(client6, "::1", port_of(v6)));
    /* A listener that was never bound gets a port. */
    int unbound = tcp();
    SAY(listen(unbound, 1));
    printf("port %d\n", port_of(unbound) != 0);
    SAY(dial(tcp(), "127.0.0.1", port_of(unbound)));
    /* AF_UNIX, by name and by abstract name. */
    struct sockaddr_un un = {.sun_family = AF_UNIX, .sun_path = "\0kso test"};
    int u = socket(AF_UNIX, SOCK_STREAM, 0), uc = socket(AF_UNIX, SOCK_STREAM, 0);
    SAY(bind(u, (void *)&un, 12));
    SAY(listen(u, 5));
    SAY(connect(uc, (void *)&un, 12));
    int pair[2];
    SAY(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
}

static void *close_soon(void *p) {
    sleep_ms(200);
    shutdown(*(int *)p, SHUT_RDWR);
    return 0;
}

static void shutdown_pending(void) {
    int fd = tcp();
    pthread_t thread;
    pthread_create(&thread, 0, close_soon, &fd);
    double start = now();
    printf("%s", result(dial(fd, BLACKHOLE, 80)));
    printf(" soon: %d\n", now() - start < 2);
    pthread_join(thread, 0);
}

static void files(void) {
    int fd = tcp(), file = open("/proc/self/exe", O_RDONLY), pipes[2];
    dial(fd, ORIGIN, 7007);
    write(fd, "g", 1);
    off_t offset = 0;
    long sent = 0, n;
    while (sent < 8000 && (n = sendfile(fd, file, &offset, 8000 - sent)) > 0) sent += n;
    pipe(pipes);
    write(pipes[1], "0123456789", 10);
    SAY(splice(pipes[0], 0, fd, 0, 10, 0));
    shutdown(fd, SHUT_WR);
    char buffer[100] = "";
    read(fd, buffer, 99);
    printf("sendfile %ld, %s", sent, buffer);
}

static void fastopen(void) {
    int fd = tcp(), one = 1;
    SAY(setsockopt(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &one, sizeof one));
    SAY(dial(fd, ORIGIN, 7007));
    printf("%s\n", echo(fd, "deferred"));
    fd = tcp();
    struct address a = to(ORIGIN, 7007);
    SAY(sendto(fd, "efast", 5, MSG_FASTOPEN, (void *)&a.storage, a.length));
    char buffer[10] = "";
    recv(fd, buffer, 4, MSG_WAITALL);
    printf("%s\n", buffer);
}

static void *blocked_connect(void *p) {
    int fd = tcp();
    dial(fd, BLACKHOLE, 80);
    return 0;
}

/* Many calls are blocked: another is answered at once. */
static void blocked_elsewhere(void) {
    pthread_t thread;
    for (int i = 0; i < 30; i++) pthread_create(&thread, 0, blocked_connect, 0);
    sleep_ms(100);
    double start = now();
    for (int i = 0; i < 50; i++) {
        int fd = tcp();
        if (dial(fd, ORIGIN, 7007)) printf("%s\n", strerrorname_np(errno));
        close(fd);
    }
    printf("in time: %d\n", now() - start < 2);
    fflush(stdout);
    _exit(0);
}

static void vfork_child(void) {
    /* posix_spawn and system() use CLONE_VFORK: the parent sleeps while the child runs. */
    fflush(stdout);
    SAY(system("true"));
    int fd = tcp(), status = 0;
    pid_t child = vfork();
    if (!child) {
        int rc = dial(fd, ORIGIN, 7007);
        _exit(rc ? errno : 0);
    }
    waitpid(child, &status, 0);
    printf("the child's connect: %d\n", WEXITSTATUS(status));
    SAY(dial(tcp(), ORIGIN, 7007));
}

int main(int argc, char **argv) {
    arguments = argv;
    return run_case((struct test_case[]){{"nonblocking", nonblocking}, {"pending", pending}, {"errors", errors}, {"late_errors", late_errors},
        {"epoll_modes", epoll_modes}, {"epoll_many", epoll_many}, {"epoll_blocked", epoll_blocked}, {"duplicates", duplicates},
        {"fork_after", fork_after}, {"fork_before", fork_before}, {"exec_keeps", exec_keeps}, {"exec_child", exec_child}, {"threads", threads},
        {"passing", passing}, {"interrupted", interrupted}, {"interrupted_storm", interrupted_storm}, {"timeouts", timeouts},
        {"options_before", options_before}, {"options_after", options_after}, {"options_on_listener", options_on_listener},
        {"half_close", half_close}, {"bound", bound}, {"mapped", mapped}, {"again", again}, {"bad_arguments", bad_arguments},
        {"inside", inside}, {"shutdown_pending", shutdown_pending}, {"files", files}, {"fastopen", fastopen},
        {"blocked_elsewhere", blocked_elsewhere}, {"vfork_child", vfork_child}, {0}}, argc, argv);
}
