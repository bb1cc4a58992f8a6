/* sendfile(2) from a file to a connection, in every way there is. ARGS: DIRECTORY PORT
 *
 * The peer reads one letter, which says how it behaves, and at the end of the stream tells the number, a hash and the sum of the bytes
 * that it got:
 *   h  reads at once     s  reads slowly     p  reads when another connection has said g     c  closes after 300 KB */
#include "guest.h"

#define SIZE (5 * 1024 * 1024 + 17)
#define FNV 0xcbf29ce484222325ull

static const char *directory;
static int port;

struct seen {
    unsigned long long bytes, hash, sum;
};

static struct seen expected;

static void expect(const unsigned char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        expected.hash = (expected.hash ^ bytes[i]) * 0x100000001b3ull;
        expected.sum += bytes[i];
    }
    expected.bytes += n;
}

static unsigned char *content;

static const char *path_of(const char *name) {
    static char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static int make(const char *name, const unsigned char *bytes, size_t n) {
    int fd = open(path_of(name), O_RDWR | O_CREAT | O_TRUNC, 0644);
    for (size_t done = 0; done < n;) {
        ssize_t w = write(fd, bytes + done, n - done);
        if (w <= 0) exit(9);
        done += w;
    }
    close(fd);
    return open(path_of(name), O_RDONLY);
}

static int begin(char how) {
    int s = tcp();
    if (dial(s, ORIGIN, port) < 0) printf("connect: %s\n", strerrorname_np(errno)), exit(9);
    write(s, &how, 1);
    expected = (struct seen){.hash = FNV};
    return s;
}

static void go(void) {
    int s = tcp();
    dial(s, ORIGIN, port);
    write(s, "g", 1);
    close(s);
}

/* Ends the stream, and compares what the peer got with what was sent. */
static void end(const char *name, int s, int ordered) {
    char text[200] = "";
    size_t n = 0;
    struct seen got = {0};
    shutdown(s, SHUT_WR);
    for (ssize_t r; n < sizeof text - 1 && (r = read(s, text + n, sizeof text - 1 - n)) > 0;) n += r;
    sscanf(text, "%llu %llu %llu", &got.bytes, &got.hash, &got.sum);
    int same = got.bytes == expected.bytes && got.sum == expected.sum && (!ordered || got.hash == expected.hash);
    printf("%s: the peer got %s\n", name, same ? "the same" : "OTHERS");
    if (!same) printf("  %llu bytes, not %llu\n", got.bytes, expected.bytes);
    fflush(stdout);
    close(s);
}

static void simple(void) {
    int s = begin('h'), f = make("file", content, SIZE);
    SAY(sendfile(s, f, NULL, SIZE));
    SAY(lseek(f, 0, SEEK_CUR));
    expect(content, SIZE);
    SAY(sendfile(s, f, NULL, SIZE));
    off_t at = 1000003;
    SAY(sendfile(s, f, &at, 2000000));
    expect(content + 1000003, 2000000);
    printf("offset %ld, position %ld\n", (long)at, (long)lseek(f, 0, SEEK_CUR));
    at = SIZE - 100000;
    SAY(sendfile(s, f, &at, 1 << 30));
    expect(content + SIZE - 100000, 100000);
    printf("offset %ld\n", (long)at);
    at = SIZE;
    SAY(sendfile(s, f, &at, 1 << 20));
    at = SIZE * 2l;
    SAY(sendfile(s, f, &at, 1 << 20));
    printf("offset %ld\n", (long)at);
    SAY(lseek(f, 77, SEEK_SET));
    SAY(sendfile(s, f, NULL, 1000000));
    expect(content + 77, 1000000);
    SAY(sendfile(s, f, NULL, 100));
    expect(content + 1000077, 100);
    SAY(lseek(f, 0, SEEK_CUR));
    int s2 = dup(s), f2 = dup(f);
    SAY(sendfile(s2, f2, NULL, 500000));
    expect(content + 1000177, 500000);
    SAY(lseek(f, 0, SEEK_CUR));
    close(f2), close(s2);
    pid_t child = fork();
    if (!child) _exit(sendfile(s, f, NULL, 400000) == 400000 ? 3 : 4);
    int status;
    waitpid(child, &status, 0);
    expect(content + 1500177, 400000);
    printf("child %d, position %ld\n", WEXITSTATUS(status), (long)lseek(f, 0, SEEK_CUR));
    end("simple", s, 1);
    close(f);
}

static void wrong(void) {
    int s = begin('h'), f = make("file", content, SIZE);
    int w = open(path_of("file"), O_WRONLY);
    SAY(sendfile(s, w, NULL, 1 << 20));
    SAY(sendfile(s, -1, NULL, 1 << 20));
    SAY(sendfile(-1, f, NULL, 1 << 20));
    off_t at = -1;
    SAY(sendfile(s, f, &at, 1 << 20));
    SAY(sendfile(s, f, (off_t *)8, 1 << 20));
    SAY(sendfile(s, f, NULL, 0));
    SAY(lseek(f, 0, SEEK_CUR));
    shutdown(s, SHUT_WR);
    signal(SIGPIPE, SIG_IGN);
    SAY(sendfile(s, f, NULL, 1 << 20));
    SAY(lseek(f, 0, SEEK_CUR));
    end("wrong", s, 1);
    close(f), close(w);
}

/* The peer has read all of a part before the file changes: what is under way refers to the file's pages, natively too. */
static void part(const char *name, int f, off_t at, size_t n, const unsigned char *bytes, size_t expected_) {
    int s = begin('h');
    printf("%s: ", name);
    SAY(sendfile(s, f, &at, n));
    expect(bytes, expected_);
    end(name, s, 1);
}

static void changing(void) {
    int f = make("file", content, SIZE), w = open(path_of("file"), O_RDWR);
    part("whole", f, 0, 1 << 30, content, SIZE);
    SAY(pwrite(w, content, 100000, SIZE));
    part("longer", f, SIZE, 1 << 30, content, 100000);
    /* Through a mapping, without msync. */
    unsigned char *map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, w, 0);
    for (int i = 0; i < SIZE; i += 1000) map[i] ^= 0x55;
    part("mapped", f, 0, SIZE, map, SIZE);
    /* And with nothing left open by which it was changed. */
    unsigned char *copy = malloc(SIZE);
    for (int i = 0; i < SIZE; i += 777) map[i] ^= 0xaa;
    memcpy(copy, map, SIZE);
    close(w);
    munmap(map, SIZE);
    part("unmapped", f, 0, SIZE, copy, SIZE);
    usleep(100000);
    part("later", f, 0, SIZE, copy, SIZE);
    w = open(path_of("file"), O_RDWR);
    SAY(ftruncate(w, 300000));
    part("shorter", f, 0, SIZE, copy, 300000);
    close(w);
    unlink(path_of("file"));
    usleep(100000);
    part("unlinked", f, 1, 200000, copy + 1, 200000);
    free(copy);
    close(f);
}

/* Writes of all sizes between parts of the file: 64 MiB, in order. */
static void interleaved(void) {
    int s = begin('h'), f = make("file", content, SIZE);
    unsigned seed = 1, parts = 0;
    while (expected.bytes < 64 << 20) {
        seed = seed * 1103515245 + 12345;
        size_t n = 1 + (seed >> 8) % 70000;
        if (write(s, content + n, n) != (ssize_t)n) printf("write: %s\n", strerrorname_np(errno)), exit(9);
        expect(content + n, n);
        seed = seed * 1103515245 + 12345;
        off_t at = (seed >> 4) % SIZE;
        n = (seed >> 8) % 3000000;
        size_t want = n < SIZE - (size_t)at ? n : SIZE - (size_t)at;
        off_t from = at;
        ssize_t sent = sendfile(s, f, &at, n);
        if (sent != (ssize_t)want || at != from + sent) printf("sent %zd of %zu\n", sent, want), exit(9);
        expect(content + from, want);
        parts++;
    }
    printf("%u parts\n", parts);
    end("interleaved", s, 1);
    close(f);
}

/* As servers do: after a short count or EAGAIN they wait for an event. */
static void nonblocking(char how, unsigned trigger) {
    int s = begin(how), f = make("file", content, SIZE), e = epoll_create1(0), room = 1;
    fcntl(s, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLOUT | trigger};
    epoll_ctl(e, EPOLL_CTL_ADD, s, &event);
    off_t at = 0;
    for (int round = 0; round < 5;) {
        if (!room && epoll_wait(e, &event, 1, 60000) != 1) printf("no event\n"), exit(9);
        off_t from = at, want = SIZE - at < 2 << 20 ? SIZE - at : 2 << 20;
        ssize_t sent = sendfile(s, f, &at, want);
        room = sent == want;
        if (sent < 0 && errno == EAGAIN) continue;
        if (sent <= 0 || at != from + sent) printf("sendfile: %s\n", result(sent)), exit(9);
        expect(content + from, sent);
        if (at == SIZE) at = 0, round++;
    }
    fcntl(s, F_SETFL, 0);
    end(trigger ? "non-blocking, edge-triggered" : "non-blocking", s, 1);
    close(e), close(f);
}

static void broken(void) {
    int s = begin('c'), f = make("file", content, SIZE);
    signal(SIGPIPE, SIG_IGN);
    ssize_t sent = 0;
    for (int i = 0; i < 1000 && sent >= 0; i++) {
        off_t at = 0;
        sent = sendfile(s, f, &at, SIZE);
    }
    int error = errno;
    printf("a peer that closes: %s\n", sent < 0 && (error == EPIPE || error == ECONNRESET) ? "broken" : result(sent));
    off_t at = 0;
    SAY(sendfile(s, f, &at, SIZE));
    close(s), close(f);
}

static volatile sig_atomic_t signals;
static void count(int number) { (void)number, signals++; }

static void interrupted(int flags) {
    int s = begin('p'), f = make("file", content, SIZE);
    struct sigaction action = {.sa_handler = count, .sa_flags = flags};
    sigaction(SIGALRM, &action, NULL);
    signals = 0;
    /* Fills the buffers until a call is interrupted that has sent something, or nothing. */
    struct itimerval every = {{0, 300000}, {0, 300000}};
    setitimer(ITIMER_REAL, &every, NULL);
    ssize_t sent;
    off_t at = 0;
    do {
        off_t from = at = at == SIZE ? 0 : at;
        sent = sendfile(s, f, &at, SIZE - at);
        if (sent > 0) expect(content + from, sent);
    } while (sent > 0 && at == SIZE);
    struct itimerval off = {0};
    setitimer(ITIMER_REAL, &off, NULL);
    int interrupted = sent > 0 || (sent < 0 && errno == EINTR);
    printf("signal: %s, %s\n", interrupted ? "interrupted" : result(sent), signals > 0 ? "handled" : "NOT handled");
    go();
    while (at < SIZE) {
        off_t from = at;
        sent = sendfile(s, f, &at, SIZE - at);
        if (sent <= 0) printf("sendfile: %s\n", result(sent)), exit(9);
        expect(content + from, sent);
    }
    end("interrupted", s, 1);
    close(f);
}

static void limited(void) {
    int s = begin('p'), f = make("file", content, SIZE);
    struct timeval limit = {0, 200000};
    setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    ssize_t sent;
    off_t at;
    do {
        at = 0;
        sent = sendfile(s, f, &at, SIZE);
        if (sent > 0) expect(content, sent);
    } while (sent == SIZE);
    if (sent > 0) {
        off_t from = at;
        sent = sendfile(s, f, &at, SIZE - at);
        if (sent > 0) expect(content + from, sent);
    }
    printf("a time limit: %s\n", sent > 0 || errno == EAGAIN ? "kept" : result(sent));
    go();
    end("limited", s, 1);
    close(f);
}

static int shared;

static void *send_all(void *file) {
    for (int round = 0; round < 3; round++) {
        off_t at = 0;
        while (at < SIZE)
            if (sendfile(shared, *(int *)file, &at, SIZE - at) <= 0) return "failed";
    }
    return "done";
}

static void threads(void) {
    shared = begin('h');
    int files[2] = {make("file", content, SIZE), make("other", content, SIZE)};
    pthread_t thread[2];
    for (int i = 0; i < 2; i++) pthread_create(&thread[i], NULL, send_all, &files[i]);
    for (int i = 0; i < 2; i++) {
        void *how;
        pthread_join(thread[i], &how);
        printf("thread %s\n", (char *)how);
    }
    for (int i = 0; i < 6; i++) expect(content, SIZE);
    end("two threads", shared, 0);
    close(files[0]), close(files[1]);
}

/* Killed in the middle: its peer sees the end of the stream. */
static void killed(void) {
    int s = begin('p'), f = make("file", content, SIZE);
    pid_t child = fork();
    if (!child) {
        for (;;) {
            off_t at = 0;
            sendfile(s, f, &at, SIZE);
        }
    }
    usleep(300000);
    kill(child, SIGKILL);
    int status;
    waitpid(child, &status, 0);
    printf("killed by %d\n", WTERMSIG(status));
    go();
    /* What was under way may have gone or not: a multiple of nothing. The stream works still. */
    shutdown(s, SHUT_WR);
    char text[200];
    printf("the peer %s\n", read(s, text, sizeof text) > 0 ? "answers" : "does not answer");
    close(s), close(f);
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    directory = argv[1];
    port = atoi(argv[2]);
    content = malloc(SIZE);
    for (unsigned i = 0; i < SIZE; i++) content[i] = i * 2654435761u >> 13;
    simple();
    wrong();
    changing();
    interleaved();
    nonblocking('h', 0);
    nonblocking('s', 0);
    nonblocking('h', EPOLLET);
    nonblocking('s', EPOLLET);
    broken();
    interrupted(0);
    interrupted(SA_RESTART);
    limited();
    threads();
    killed();
    printf("over\n");
    fflush(stdout);
    if (argc > 3) read(0, &(char){0}, 1);
    return 0;
}
