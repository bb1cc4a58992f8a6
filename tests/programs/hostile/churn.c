/* churn CASE SECONDS: processes and descriptors that go away under pending calls. Prints "done" at the end. */
#include "../guest.h"

static double end;
static int going(void) { return now() < end; }

static void *pend(void *p) {
    int fd = (long)p % 2 ? tcp() : socket(AF_INET6, SOCK_STREAM, 0);
    if ((long)p % 2) dial(fd, BLACKHOLE, 80);
    else dial(fd, "::ffff:10.77.0.99", 80);
    return 0;
}

static void *work(void *p) {
    while (going()) {
        int fd = tcp();
        dial(fd, ORIGIN, 7007);
        close(fd);
    }
    return 0;
}

/* Only ever a child of ours: a failed fork's -1 would mean everybody. */
static void send_signal(pid_t child, int signal) {
    if (child > 1) kill(child, signal);
}

/* Forks while connects are pending in other threads. */
static void forks(void) {
    pthread_t thread;
    for (long i = 0; i < 20; i++) pthread_create(&thread, 0, pend, (void *)i);
    pthread_create(&thread, 0, work, 0);
    while (going()) {
        pid_t child = fork();
        if (!child) {
            int fd = tcp();
            dial(fd, ORIGIN, 7007);
            _exit(0);
        }
        waitpid(child, 0, 0);
    }
}

/* Exits in the middle of its calls: of one thread, of all. */
static void exits(void) {
    pid_t list[24] = {0};
    for (unsigned n = 0; going(); n = (n + 1) % 24) {
        if (list[n] > 1) send_signal(list[n], SIGKILL), waitpid(list[n], 0, 0);
        list[n] = fork();
        if (!list[n]) {
            pthread_t thread;
            for (long i = 0; i < 6; i++) pthread_create(&thread, 0, i % 2 ? pend : work, (void *)i);
            usleep(rand() % 3000);
            if (n % 2) _exit(0);
            /* The first thread alone: the others go on under a dead leader. */
            syscall(SYS_exit, 0);
        }
        usleep(2000);
    }
    for (int i = 0; i < 24; i++)
        if (list[i] > 1) send_signal(list[i], SIGKILL), waitpid(list[i], 0, 0);
}

static int targets[8];
static void *closer(void *p) {
    while (going()) {
        int i = rand() % 8;
        switch (rand() % 3) {
            case 0: close(targets[i]); break;
            case 1: dup2(targets[rand() % 8], targets[i]); break;
            default: {
                /* No call on it may take long: its limit is there before anyone sees it. */
                int fd = tcp();
                struct timeval limit = {0, 20000};
                setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
                dup2(fd, targets[i]);
                close(fd);
            }
        }
    }
    return 0;
}

static void *opener(void *p) {
    int ep = epoll_create1(0);
    while (going()) {
        int fd = targets[rand() % 8];
        struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLET};
        epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
        int flags = fcntl(fd, F_GETFL);
        if (flags >= 0) fcntl(fd, F_SETFL, flags ^ (rand() % 2 ? O_NONBLOCK : 0));
        int pick = rand() % 4;
        if (pick == 0) dial(fd, BLACKHOLE, 80);
        else if (pick == 1) dial(fd, ORIGIN, 9);
        else dial(fd, ORIGIN, 7007);
        if (rand() % 8 == 0) listen(fd, 5);
        name_of(fd, rand() % 2);
    }
    return 0;
}

/* Closes, duplicates and replaces descriptors while other threads connect them. */
static void closes(void) {
    pthread_t thread[10];
    for (int i = 0; i < 8; i++) targets[i] = dup2(0, 200 + i);
    for (int i = 0; i < 4; i++) pthread_create(&thread[i], 0, closer, 0);
    for (int i = 4; i < 10; i++) pthread_create(&thread[i], 0, opener, 0);
    for (int i = 0; i < 10; i++) pthread_join(thread[i], 0);
}

/* SIGKILL at any moment of connecting, listening children. */
static void kills(void) {
    pid_t list[16] = {0};
    while (going()) {
        int i = rand() % 16;
        if (list[i] > 1) send_signal(list[i], SIGKILL), waitpid(list[i], 0, 0);
        list[i] = fork();
        if (!list[i]) {
            end = now() + 5;
            srand(getpid());
            pthread_t thread;
            for (long j = 0; j < 3; j++) pthread_create(&thread, 0, j ? work : pend, (void *)j);
            work(0);
            _exit(0);
        }
        usleep(rand() % 3000);
    }
    for (int i = 0; i < 16; i++)
        if (list[i] > 1) send_signal(list[i], SIGKILL), waitpid(list[i], 0, 0);
}

/* Stops and continues children in their calls, and signals them all the time. */
static void on_signal(int s) {}
static void signals(void) {
    pid_t list[6];
    for (int i = 0; i < 6; i++) {
        list[i] = fork();
        if (!list[i]) {
            struct sigaction action = {.sa_handler = on_signal, .sa_flags = i % 2 ? SA_RESTART : 0};
            sigaction(SIGUSR1, &action, 0);
            pthread_t thread;
            pthread_create(&thread, 0, work, 0);
            work(0);
            _exit(0);
        }
    }
    while (going()) {
        int i = rand() % 6, pick = rand() % 10;
        send_signal(list[i], pick == 0 ? SIGSTOP : pick < 3 ? SIGCONT : SIGUSR1);
        usleep(rand() % 300);
    }
    for (int i = 0; i < 6; i++)
        if (list[i] > 1) send_signal(list[i], SIGKILL), waitpid(list[i], 0, 0);
}

int main(int argc, char **argv) {
    end = now() + atof(argv[2]);
    srand(1);
    struct rlimit core = {0, 0};
    setrlimit(RLIMIT_CORE, &core);
    run_case((struct test_case[]){{"forks", forks}, {"exits", exits}, {"closes", closes}, {"kills", kills}, {"signals", signals}, {0}}, argc, argv);
    /* After all that the sandbox still works. */
    int fd = tcp();
    int rc = dial(fd, ORIGIN, 7007);
    printf("done %s %s\n", result(rc), echo(fd, "alive"));
    fflush(stdout);
    char c;
    read(0, &c, 1);
    _exit(0);
}
