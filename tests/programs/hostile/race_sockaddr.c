/* race_sockaddr ROUNDS: a thread swaps the address under connect between an allowed and a denied one. */
#include "../guest.h"

static struct sockaddr_in shared, allowed, denied;
static atomic_int stop;

static void *swap(void *p) {
    while (!stop) {
        shared = allowed;
        __asm__ volatile("" ::: "memory");
        shared = denied;
        __asm__ volatile("" ::: "memory");
    }
    return 0;
}

int main(int argc, char **argv) {
    struct address a = to(ORIGIN, 7007), b = to("10.77.0.3", 7007);
    allowed = *(struct sockaddr_in *)&a.storage, denied = *(struct sockaddr_in *)&b.storage, shared = allowed;
    pthread_t thread[2];
    pthread_create(&thread[0], 0, swap, 0);
    pthread_create(&thread[1], 0, swap, 0);
    int connected = 0, refused = 0, wrong = 0, other = 0;
    for (int i = 0; i < atoi(argv[1]); i++) {
        int fd = i % 2 ? tcp() : tcp_nonblocking();
        struct timeval limit = {0, 20000};
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        int rc = connect(fd, (void *)&shared, sizeof shared);
        if (rc && errno == EINPROGRESS) rc = ready(fd, POLLOUT, 3000) == POLLOUT ? 0 : -1;
        if (!rc) {
            connected++;
            if (!strncmp(name_of(fd, 1), "10.77.0.3 ", 10)) wrong++;
            /* Disconnect and go on with the socket that the broker made. */
            struct sockaddr none = {.sa_family = AF_UNSPEC};
            connect(fd, &none, sizeof none);
            if (!connect(fd, (void *)&shared, sizeof shared) && !strncmp(name_of(fd, 1), "10.77.0.3 ", 10)) wrong++;
        } else if (errno == EACCES) {
            refused++;
        } else {
            other++;
        }
        close(fd);
    }
    stop = 1;
    fprintf(stderr, "connected %d refused %d other %d\n", connected, refused, other);
    printf("wrong %d\n", wrong);
    return connected && refused ? 0 : 1;
}
