// As root in a guest: takes the sockets of init, which are its streams to the broker, and writes garbage to them.
// guest_garbage random|huge|zeros|close
#define _GNU_SOURCE
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "random";
    int init = syscall(SYS_pidfd_open, 1, 0);
    if (init < 0) {
        perror("pidfd_open");
        return 0;
    }
    DIR *dir = opendir("/proc/1/fd");
    if (!dir) {
        perror("/proc/1/fd");
        return 0;
    }
    static char bytes[1 << 16];
    srand(7);
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = strcmp(what, "random") == 0 ? rand() : strcmp(what, "huge") == 0 ? 0xff : 0;
    int taken = 0;
    for (struct dirent *e; (e = readdir(dir));) {
        int number = atoi(e->d_name);
        if (number < 3) continue;
        int fd = syscall(SYS_pidfd_getfd, init, number, 0);
        if (fd < 0) continue;
        int domain = 0;
        socklen_t length = sizeof domain;
        if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 && domain == AF_VSOCK) {
            taken++;
            if (strcmp(what, "close") == 0)
                shutdown(fd, SHUT_RDWR);
            else
                for (int i = 0; i < 16; i++) send(fd, bytes, sizeof bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
        }
        close(fd);
    }
    printf("taken %d\n", taken);
    fflush(stdout);
    sleep(3);
    return 0;
}
