/* client ADDRESS PORT FIRST TEXT: connects, sends FIRST and TEXT, shuts down, prints what comes. */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list;
    int error = getaddrinfo(argv[1], argv[2], &hints, &list);
    if (error) return printf("getaddrinfo: %s\n", gai_strerror(error)), 1;
    int fd = socket(list->ai_family, SOCK_STREAM, 0);
    if (connect(fd, list->ai_addr, list->ai_addrlen)) return printf("connect: %s\n", strerror(errno)), 1;
    write(fd, argv[3], strlen(argv[3]));
    if (argc > 4) write(fd, argv[4], strlen(argv[4]));
    shutdown(fd, SHUT_WR);
    char buffer[65536];
    for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) != 0;) {
        if (n < 0) return printf("read: %s\n", strerror(errno)), 1;
        fwrite(buffer, 1, n, stdout);
    }
    puts("");
    return 0;
}
