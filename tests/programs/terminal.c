/* terminal: what it finds of its terminal; ends at the end of input. */
#include "guest.h"
#include <termios.h>

static volatile sig_atomic_t winch, interrupted;
static void on_winch(int s) { winch = 1; }
static void on_int(int s) { interrupted = 1; }

static void size(const char *what) {
    struct winsize w;
    ioctl(0, TIOCGWINSZ, &w);
    printf("%s %dx%d", what, w.ws_row, w.ws_col);
}

int main(void) {
    sigaction(SIGWINCH, &(struct sigaction){.sa_handler = on_winch}, 0);
    sigaction(SIGINT, &(struct sigaction){.sa_handler = on_int}, 0);
    printf("tty %d%d%d ", isatty(0), isatty(1), isatty(2));
    size("size");
    printf(" foreground %d\n", tcgetpgrp(0) == getpgrp());
    fflush(stdout);
    char line[200];
    for (;;) {
        ssize_t n = read(0, line, sizeof line - 1);
        if (winch) winch = 0, size("resized"), puts("");
        if (interrupted) interrupted = 0, puts("SIGINT");
        if (n > 0) line[n] = 0, printf("line: %s", line);
        fflush(stdout);
        if (n == 0 || (n < 0 && errno != EINTR)) break;
    }
    puts("end of input");
    return 5;
}
