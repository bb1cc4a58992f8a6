/* storm held COUNT | storm short COUNT: COUNT connections to port 7008, all at once, or one after the other (prints the
 * rate of each tenth). */
#include "guest.h"

int main(int argc, char **argv) {
    int count = atoi(argv[2]);
    struct rlimit many = {count + 100, count + 100};
    if (!strcmp(argv[1], "held")) {
        if (setrlimit(RLIMIT_NOFILE, &many)) return perror("setrlimit"), 1;
        int *list = calloc(count, sizeof *list), bad = 0;
        for (int i = 0; i < count; i++) {
            list[i] = tcp();
            if (dial(list[i], i % 2 ? ORIGIN : "10.77.0.3", 7008) && bad++ < 3) perror("connect");
        }
        printf("open %d bad %d\n", count, bad), fflush(stdout);
        char c;
        read(0, &c, 1);
        for (int i = 0; i < count; i += 97) {
            char text[100] = "", got[100];
            send(list[i], text, 100, MSG_NOSIGNAL);
            if (recv(list[i], got, 100, MSG_WAITALL) != 100) bad++;
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
            if (dial(fd, ORIGIN, 7008)) { bad++; close(fd); continue; }
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
