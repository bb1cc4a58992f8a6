/* storm held COUNT | storm short COUNT: COUNT connections to port 7008, all at once, or one after the other (prints the
 * rate of each tenth). */
#include "guest.h"

static void held(int count, int channel) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    int *list = calloc(count, sizeof *list), bad = 0, c;
    for (int i = 0; i < count; i++) {
        list[i] = tcp();
        if (dial(list[i], i % 2 ? ORIGIN : "10.77.0.3", i % 2 ? 7008 : 7009) && bad++ < 3) perror("connect");
    }
    send(channel, (int[]){count, bad}, 8, 0);
    recv(channel, &c, 1, 0);
    for (int i = 0; i < count; i += 97) {
        char text[100] = "", got[100];
        send(list[i], text, 100, MSG_NOSIGNAL);
        if (recv(list[i], got, 100, MSG_WAITALL) != 100) bad++;
    }
    send(channel, (int[]){count, bad}, 8, 0);
    _exit(0);
}

int main(int argc, char **argv) {
    int count = atoi(argv[2]);
    if (!strcmp(argv[1], "held")) {
        /* Four processes, for a process may have no more than fs.nr_open descriptors. */
        int channel[4][2], total = 0, bad = 0;
        for (int part = 0; part < 4; part++) {
            socketpair(AF_UNIX, SOCK_STREAM, 0, channel[part]);
            if (!fork()) {
                for (int i = 0; i < part; i++) close(channel[i][0]);
                close(channel[part][0]);
                held(count / 4, channel[part][1]);
            }
            close(channel[part][1]);
        }
        int got[2];
        for (int part = 0; part < 4; part++) {
            if (recv(channel[part][0], got, sizeof got, MSG_WAITALL) != sizeof got) return puts("a part died"), 1;
            total += got[0], bad += got[1];
        }
        printf("open %d bad %d\n", total, bad), fflush(stdout);
        char c;
        read(0, &c, 1);
        for (int part = 0; part < 4; part++) {
            send(channel[part][0], "x", 1, 0);
            recv(channel[part][0], got, sizeof got, MSG_WAITALL);
            bad += got[1];
        }
        printf("echoed, bad %d\n", bad);
        return bad != 0;
    }
    int bad = 0;
    for (int tenth = 0; tenth < 10; tenth++) {
        double start = now();
        for (int i = 0; i < count / 10; i++) {
            char text[100] = "";
            int fd = tcp();
            /* By turns to four addresses: a port in TIME_WAIT is taken for one peer only. */
            static const char *peers[] = {ORIGIN, "10.77.0.3", "10.77.0.4", ORIGIN6};
            if (i % 4 == 3) close(fd), fd = socket(AF_INET6, SOCK_STREAM, 0);
            if (dial(fd, peers[i % 4], 7008)) { bad++; close(fd); continue; }
            send(fd, text, 100, MSG_NOSIGNAL);
            if (recv(fd, text, 100, MSG_WAITALL) != 100) bad++;
            close(fd);
        }
        printf("rate %.0f\n", count / 10 / (now() - start)), fflush(stdout);
    }
    printf("bad %d\n", bad), fflush(stdout);
    char c;
    read(0, &c, 1);
    return bad != 0;
}
