/* acceptor PORT: an epoll server for storms of connections: answers each 100 bytes with 100 bytes. */
#include "guest.h"

int main(int argc, char **argv) {
    struct rlimit many;
    getrlimit(RLIMIT_NOFILE, &many);
    many.rlim_cur = many.rlim_max;
    setrlimit(RLIMIT_NOFILE, &many);
    int server = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1, ep = epoll_create1(0);
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct address a = to("::", atoi(argv[1]));
    if (bind(server, (void *)&a.storage, a.length) || listen(server, 4096)) return perror("listen"), 1;
    struct epoll_event e = {.events = EPOLLIN, .data.fd = server}, list[256];
    epoll_ctl(ep, EPOLL_CTL_ADD, server, &e);
    puts("ready"), fflush(stdout);
    for (;;) {
        int n = epoll_wait(ep, list, 256, -1);
        for (int i = 0; i < n; i++) {
            int fd = list[i].data.fd;
            if (fd == server) {
                while ((fd = accept4(server, 0, 0, SOCK_NONBLOCK)) >= 0) {
                    e = (struct epoll_event){.events = EPOLLIN, .data.fd = fd};
                    epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
                }
                continue;
            }
            char data[4096];
            ssize_t got = read(fd, data, sizeof data);
            if (got <= 0) close(fd);
            else send(fd, data, got, MSG_NOSIGNAL);
        }
    }
}
