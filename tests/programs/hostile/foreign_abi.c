/* foreign_abi: connects by the system calls of another ABI (i386 by int 0x80, x32) on inside and host sockets. */
#include "../guest.h"

static long int80(long n, long a, long b, long c) {
    long rc;
    __asm__ volatile("int $0x80" : "=a"(rc) : "a"(n), "b"(a), "c"(b), "d"(c) : "memory", "r8", "r9", "r10", "r11");
    return rc;
}

static int in_child(void (*f)(int), int fd, const char *what) {
    int status;
    fflush(stdout);
    pid_t child = fork();
    if (!child) f(fd), _exit(0);
    waitpid(child, &status, 0);
    printf("%s: %s\n", what, WIFSIGNALED(status) ? "killed" : "lived");
    return 0;
}

static struct sockaddr_in *low;
static void by_int80(int fd) {
    /* connect is 362; socketcall is 102 with SYS_CONNECT 3. */
    long rc = int80(362, fd, (long)low, sizeof *low);
    fprintf(stderr, "int80 connect %ld\n", rc);
    uint32_t *list = (uint32_t *)(low + 4);
    list[0] = fd, list[1] = (uint32_t)(long)low, list[2] = sizeof *low;
    rc = int80(102, 3, (long)list, 0);
    fprintf(stderr, "int80 socketcall %ld\n", rc);
    int made = int80(359, AF_INET, SOCK_STREAM, 0);
    rc = int80(362, made, (long)low, sizeof *low);
    fprintf(stderr, "int80 socket %d connect %ld\n", made, rc);
}
static void by_x32(int fd) {
    long rc = syscall(0x40000000 | SYS_connect, fd, low, sizeof *low);
    fprintf(stderr, "x32 connect %s\n", result(rc));
    rc = syscall(0x40000000 | SYS_socket, AF_INET, SOCK_STREAM, 0);
    fprintf(stderr, "x32 socket %s\n", result(rc));
}
/* io_uring must not be a way around either. */
static void by_io_uring(int fd) {
    char params[120] = {0};
    long rc = syscall(SYS_io_uring_setup, 4, params);
    fprintf(stderr, "io_uring_setup %s\n", result(rc));
}

int main(void) {
    low = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    struct address a = to("10.77.0.3", 7007);
    *low = *(struct sockaddr_in *)&a.storage;
    int host = tcp();
    dial(host, ORIGIN, 7007);
    struct sockaddr none = {.sa_family = AF_UNSPEC};
    connect(host, &none, sizeof none);
    in_child(by_int80, host, "int80 host");
    in_child(by_int80, tcp(), "int80 inside");
    in_child(by_x32, host, "x32 host");
    in_child(by_x32, tcp(), "x32 inside");
    in_child(by_io_uring, host, "io_uring");
    return 0;
}
