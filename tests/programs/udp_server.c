/* udp_server PORT...: echoes on each port of all addresses, and prints who sent what. */
#include "guest.h"

int main(int argc, char **argv) {
    struct pollfd list[16];
    for (int i = 1; i < argc; i++) {
        int fd = socket(AF_INET6, SOCK_DGRAM, 0);
        struct address a = to("::", atoi(argv[i]));
        if (bind(fd, (void *)&a.storage, a.length)) return perror("bind"), 1;
        list[i - 1] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    puts("ready"), fflush(stdout);
    static char buffer[70000];
    while (poll(list, argc - 1, -1) > 0) {
        for (int i = 0; i < argc - 1; i++) {
            if (!list[i].revents) continue;
            struct sockaddr_in6 s;
            socklen_t length = sizeof s;
            char ip[64];
            ssize_t n = recvfrom(list[i].fd, buffer, sizeof buffer, 0, (void *)&s, &length);
            if (n < 0) continue;
            printf("port %s: %zd from %s %d\n", argv[i + 1], n, inet_ntop(AF_INET6, &s.sin6_addr, ip, 64), ntohs(s.sin6_port));
            fflush(stdout);
            sendto(list[i].fd, buffer, n, 0, (void *)&s, length);
        }
    }
    return 0;
}
