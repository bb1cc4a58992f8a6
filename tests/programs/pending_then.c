/* pending_then ADDRESS PORT: a non-blocking and a blocking connect, both pending until the other side accepts. */
#include "guest.h"

static char **args;
static void *blocking(void *p) {
    int fd = tcp();
    return (void *)(long)(dial(fd, args[1], atoi(args[2])) ? errno : 0);
}

int main(int argc, char **argv) {
    args = argv;
    pthread_t thread;
    int fd = tcp_nonblocking();
    pthread_create(&thread, 0, blocking, 0);
    SAY(dial(fd, argv[1], atoi(argv[2])));
    printf("events %x\n", ready(fd, POLLOUT, 300));
    puts("pending");
    fflush(stdout);
    printf("events %x, %s\n", ready(fd, POLLOUT, 20000), so_error(fd));
    void *got;
    pthread_join(thread, &got);
    printf("blocking: %ld\n", (long)got);
    puts("both connected");
    return 0;
}
