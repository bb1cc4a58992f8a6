// The init of a guest that knows nothing of kso: it loads the modules of its initramfs, makes the directory that is shared as
// `root` its root, runs the script that the kernel's command line names (script=PATH), and ends the machine.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void die(const char *what) {
    printf("INIT: %s: %s\n", what, strerror(errno));
    fflush(stdout);
    reboot(RB_AUTOBOOT);
    for (;;) pause();
}

static void mount_or_die(const char *source, const char *target, const char *kind, unsigned long flags) {
    mkdir(target, 0755);
    if (mount(source, target, kind, flags, "") < 0) die(target);
}

static void load_modules(void) {
    struct dirent **names;
    int count = scandir("/modules", &names, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char path[512];
        if (names[i]->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "/modules/%s", names[i]->d_name);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (syscall(SYS_finit_module, file, "", 0) < 0 && errno != EEXIST) printf("INIT: %s: %s\n", path, strerror(errno));
        close(file);
    }
}

int main(void) {
    int status = 0;
    char *script = getenv("script");
    if (!script) die("no script= on the command line");
    load_modules();
    mount_or_die("root", "/newroot", "virtiofs", MS_RDONLY);
    mount_or_die("proc", "/newroot/proc", "proc", 0);
    mount_or_die("sysfs", "/newroot/sys", "sysfs", 0);
    mount_or_die("devtmpfs", "/newroot/dev", "devtmpfs", 0);
    if (chroot("/newroot") < 0 || chdir("/") < 0) die("chroot");
    setenv("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    fflush(stdout);
    if (fork() == 0) {
        setsid();
        execl("/bin/sh", "sh", script, NULL);
        die("/bin/sh");
    }
    while (wait(&status) > 0 || errno == EINTR) {}
    printf("THE SCRIPT ENDED\n");
    fflush(stdout);
    sync();
    reboot(RB_AUTOBOOT);
    for (;;) pause();
}
