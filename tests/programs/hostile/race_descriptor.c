/* race_descriptor ROUNDS PORT: connect is called on a descriptor that is an inside socket when it is looked at, and one
 * of the host's when the call goes on. The address is the sandbox's own loopback: on a host socket it is the host's. */
#include "../guest.h"

static atomic_int stop;
static int target, inner, outer[64];
static int port;

static void *swap(void *p) {
    for (unsigned i = 0; !stop; i++) {
        dup2(inner, target);
        dup2(outer[i % 64], target);
    }
    return 0;
}

/* A host socket that is closed again: connected once, then dissolved. */
static int host_socket(int how) {
    int fd = how & 1 ? tcp_nonblocking() : tcp();
    struct sockaddr none = {.sa_family = AF_UNSPEC};
    struct timeval limit = {0, 5000};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    if (how & 2) {
        struct address any = to("0.0.0.0", 0);
        bind(fd, (void *)&any.storage, any.length);
        listen(fd, 1);
        connect(fd, &none, sizeof none);
        shutdown(fd, SHUT_RDWR);
        return fd;
    }
    dial(fd, ORIGIN, 7007);
    ready(fd, POLLOUT, 1000);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    connect(fd, &none, sizeof none);
    return fd;
}

int main(int argc, char **argv) {
    port = atoi(argv[2]);
    target = dup(0);
    for (int i = 0; i < 64; i++) outer[i] = host_socket(i);
    struct sockaddr_un un = {.sun_family = AF_UNIX, .sun_path = "\0nowhere"};
    struct address local = to("127.0.0.1", port), denied = to("10.77.0.3", 7007);
    pthread_t thread;
    int reached = 0;
    for (int round = 0; round < 3; round++) {
        inner = round == 0 ? tcp() : round == 1 ? socket(AF_UNIX, SOCK_STREAM, 0) : socket(AF_INET, SOCK_DGRAM, 0);
        stop = 0;
        pthread_create(&thread, 0, swap, 0);
        for (int i = 0; i < atoi(argv[1]); i++) {
            int rc;
            if (i % 3 == 0) rc = connect(target, (void *)&local.storage, local.length);
            else if (i % 3 == 1) rc = connect(target, (void *)&denied.storage, denied.length);
            else rc = connect(target, (void *)&un, sizeof un);
            if (!rc) {
                const char *peer = name_of(target, 1);
                if (!strncmp(peer, "127.0.0.1 ", 10) || !strncmp(peer, "10.77.0.3 ", 10)) {
                    char byte;
                    send(target, "ex", 2, MSG_NOSIGNAL | MSG_DONTWAIT);
                    if (ready(target, POLLIN, 50) == POLLIN && recv(target, &byte, 1, MSG_DONTWAIT) == 1) reached++;
                }
            }
        }
        stop = 1;
        pthread_join(thread, 0);
    }
    printf("reached %d\n", reached);
    return 0;
}
