/* forbidden USER CMD ARGS: runs CMD as USER where user namespaces are forbidden: the limit is set in a user namespace of
 * our own (namespaces(7): limits of all ancestors count), not on the machine. */
#include "guest.h"
#include <grp.h>
#include <sys/prctl.h>

static int put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY);
    int rc = write(fd, text, strlen(text)) < 0;
    close(fd);
    return rc;
}

int main(int argc, char **argv) {
    int to_parent[2], to_child[2], status;
    char c, path[64];
    pipe(to_parent), pipe(to_child);
    pid_t child = fork();
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (unshare(CLONE_NEWUSER)) return perror("unshare"), 99;
        write(to_parent[1], "x", 1);
        read(to_child[0], &c, 1);
        if (put("/proc/sys/user/max_user_namespaces", "0")) return perror("max_user_namespaces"), 99;
        int id = atoi(argv[1]);
        if (setgroups(0, 0) || setresgid(id, id, id) || setresuid(id, id, id)) return perror("setuid"), 99;
        execvp(argv[2], argv + 2);
        return perror(argv[2]), 99;
    }
    read(to_parent[0], &c, 1);
    snprintf(path, 64, "/proc/%d/uid_map", child), put(path, "0 0 65536");
    snprintf(path, 64, "/proc/%d/gid_map", child), put(path, "0 0 65536");
    write(to_child[1], "x", 1);
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}
