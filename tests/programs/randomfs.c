/* randomfs SEED COUNT DIR [LEFT-OUT]: so many random operations on files below DIR, by root and two others, and what each of
 * them gave. LEFT-OUT: "tmpfile" (FUSE knows O_TMPFILE since Linux 6.2), "holes" (FUSE does not send what it keeps back before it
 * asks for them).
 * randomfs tree DIR: all that is to be seen of DIR.
 *
 * The same seed gives the same operations, so that two directories can be compared. What may differ between file systems
 * is not told (times of now, blocks, sizes of directories, numbers of inodes). */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define LENGTH(a) (sizeof(a) / sizeof *(a))
#define FILES 12
#define LARGEST (256 * 1024)

static uint64_t state;
static int files[FILES];
static unsigned char data[LARGEST];
static const char *left_out = "";

/* Few names, so that they meet. */
static const char *const names[] = {
    "a", "b", "c", "a", "b", "c", "d", "d/a", "d/b", "d/c", "d/e", "d/e/a", "d/e/b", "f", "f/a", "l", "d/../a", "d/e/../../b",
};
static const char *const targets[] = { "a", "d", "../a", "e/a", "none", "l", "d/e/b", "." };
static const mode_t modes[] = { 0644, 0600, 0666, 0755, 0777, 0700, 04755, 02755, 06777, 0444, 0, 0640, 02644, 0711 };
static const char *const attributes[] = { "user.a", "user.b", "user.long" };

static uint64_t draw(void) /* splitmix64 */
{
    uint64_t z = (state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static unsigned pick(unsigned below) { return draw() % below; }
static int chance(unsigned percent) { return pick(100) < percent; }
static const char *name(void) { return names[pick(LENGTH(names))]; }
static mode_t mode(void) { return modes[pick(LENGTH(modes))]; }

static off_t offset(void)
{
    switch (pick(4)) {
    case 0: return 0;
    case 1: return 4096 * pick(64);
    case 2: return pick(9000);
    default: return pick(300000);
    }
}

static size_t length(void)
{
    switch (pick(8)) {
    case 0: return pick(10);
    case 1: return 4096;
    case 2: return 4096 * (1 + pick(16));
    case 3: return pick(LARGEST);
    default: return pick(20000);
    }
}

static void fill(size_t size)
{
    uint64_t word = 0;
    for (size_t i = 0; i < size; i++) {
        if (i % 8 == 0) word = draw();
        data[i] = word >> (i % 8 * 8);
    }
}

static uint64_t sum(const unsigned char *bytes, size_t size)
{
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001b3;
    return hash;
}

static void result(long value)
{
    if (value < 0) printf(" %s", strerrorname_np(errno));
    else printf(" %ld", value);
}

/* Most of what is done is root's; permissions matter to the others. */
static void become(unsigned user)
{
    if (seteuid(0) || setegid(user) || seteuid(user)) _exit(99);
}

static void describe(const struct stat *s)
{
    printf(" %o %d:%d", s->st_mode, (int)s->st_uid, (int)s->st_gid);
    if (!S_ISDIR(s->st_mode)) printf(" links %d", (int)s->st_nlink);
    if (S_ISREG(s->st_mode) || S_ISLNK(s->st_mode)) printf(" size %ld", (long)s->st_size);
    if (S_ISCHR(s->st_mode) || S_ISBLK(s->st_mode)) printf(" device %lx", (long)s->st_rdev);
    /* Times that were set by this program are long ago; others are now. A pipe is the client kernel's own. */
    if (!S_ISFIFO(s->st_mode) && s->st_mtim.tv_sec < 1000000000) printf(" modified %ld.%ld", s->st_mtim.tv_sec, s->st_mtim.tv_nsec);
}

static int compare(const struct dirent **a, const struct dirent **b) { return strcmp((*a)->d_name, (*b)->d_name); }

static void list(const char *path)
{
    struct dirent **entries;
    int count = scandir(path, &entries, NULL, compare);
    result(count);
    for (int i = 0; i < count; i++) {
        printf(" %s/%d", entries[i]->d_name, entries[i]->d_type);
        free(entries[i]);
    }
    if (count >= 0) free(entries);
}

static void attributes_of(const char *path)
{
    char all[1024];
    unsigned char value[8192];
    ssize_t size = llistxattr(path, all, sizeof all);
    for (char *one = all; size > 0 && one < all + size; one += strlen(one) + 1) {
        ssize_t got = lgetxattr(path, one, value, sizeof value);
        printf(" %s=%zd,%lx", one, got, got > 0 ? (long)sum(value, got) : 0);
    }
}

static void tree(const char *path, const char *shown)
{
    struct stat s;
    if (lstat(path, &s)) { printf("%s: %s\n", shown, strerrorname_np(errno)); return; }
    printf("%s:", shown);
    describe(&s);
    attributes_of(path);
    if (S_ISLNK(s.st_mode)) {
        char target[4096];
        ssize_t size = readlink(path, target, sizeof target);
        printf(" -> %.*s", (int)size, target);
    } else if (S_ISREG(s.st_mode)) {
        int fd = open(path, O_RDONLY);
        uint64_t hash = 0;
        ssize_t got;
        while ((got = read(fd, data, sizeof data)) > 0) hash = hash * 31 + sum(data, got);
        close(fd);
        printf(" sum %lx", (long)hash);
    }
    printf("\n");
    if (!S_ISDIR(s.st_mode)) return;
    struct dirent **entries;
    int count = scandir(path, &entries, NULL, compare);
    for (int i = 0; i < count; i++) {
        const char *entry = entries[i]->d_name;
        if (strcmp(entry, ".") && strcmp(entry, "..")) {
            char next[8192], next_shown[8192];
            snprintf(next, sizeof next, "%s/%s", path, entry);
            snprintf(next_shown, sizeof next_shown, "%s/%s", shown, entry);
            tree(next, next_shown);
        }
        free(entries[i]);
    }
}

static int is_regular(int fd, off_t *size)
{
    struct stat s;
    if (fstat(fd, &s) || !S_ISREG(s.st_mode)) return 0;
    *size = s.st_size;
    return 1;
}

static void keep(int fd)
{
    int *slot = &files[pick(FILES)];
    if (fd < 0) return;
    if (*slot >= 0) close(*slot);
    *slot = fd;
}

static void open_one(void)
{
    int flags = pick(3) | O_NONBLOCK | O_CLOEXEC;
    if (chance(75)) flags |= O_CREAT;
    if (chance(15)) flags |= O_EXCL;
    if (chance(15)) flags |= O_TRUNC;
    if (chance(20)) flags |= O_APPEND;
    if (chance(5)) flags |= O_NOFOLLOW;
    if (chance(4)) flags = (flags & ~(O_CREAT | O_EXCL)) | O_DIRECTORY;
    if (chance(4)) flags |= O_DSYNC;
    if (!(flags & O_CREAT)) flags &= ~O_EXCL;
    const char *path = name();
    mode_t m = mode();
    printf("open %s %x %o", path, flags, m);
    int fd = open(path, flags, m);
    result(fd < 0 ? -1 : 0);
    keep(fd);
}

static void temporary(void)
{
    const char *directory = name(), *to = name();
    int exclusive = chance(20) ? O_EXCL : 0;
    printf("tmpfile %s %x, link to %s", directory, exclusive, to);
    int fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC | exclusive, mode());
    result(fd < 0 ? -1 : 0);
    if (fd < 0) return;
    char own[64];
    snprintf(own, sizeof own, "/proc/self/fd/%d", fd);
    become(0);
    result(linkat(AT_FDCWD, own, AT_FDCWD, to, AT_SYMLINK_FOLLOW));
    keep(fd);
}

static void map(int fd)
{
    off_t size;
    if (!is_regular(fd, &size) || size == 0) { printf(" -"); return; }
    off_t from = pick((size + 4095) / 4096) * (off_t)4096;
    size_t most = size - from, whole = 1 + pick(most > 65536 ? 65536 : most);
    int writes = chance(60), private = chance(15);
    printf(" %ld+%zu%s%s", (long)from, whole, writes ? " write" : "", private ? " private" : "");
    unsigned char *memory =
        mmap(NULL, whole, PROT_READ | (writes ? PROT_WRITE : 0), private ? MAP_PRIVATE : MAP_SHARED, fd, from);
    if (memory == MAP_FAILED) { result(-1); return; }
    if (writes) {
        size_t at = pick(whole), count = 1 + pick(whole - at);
        fill(count);
        memcpy(memory + at, data, count);
        result(msync(memory, whole, MS_SYNC));
    }
    printf(" %lx", (long)sum(memory, whole));
    munmap(memory, whole);
}

/* As cp(1): how much one call copies is the kernel's own matter. */
static void copy(int from, int to, int by_sendfile)
{
    off_t in = offset(), out = offset();
    size_t left = length(), total = 0;
    int positions = chance(50);
    printf(" %zu from %ld to %ld%s", left, (long)in, (long)out, positions ? " positions" : "");
    ssize_t got = 0;
    while (left > 0) {
        if (by_sendfile) got = sendfile(to, from, positions ? NULL : &in, left);
        else got = copy_file_range(from, positions ? NULL : &in, to, positions ? NULL : &out, left, 0);
        if (got <= 0) break;
        left -= got;
        total += got;
    }
    result(got < 0 ? -1 : 0);
    printf(" %zu", total);
}

static void set_acl(const char *path)
{
    /* struct posix_acl_xattr_header and its entries (include/uapi/linux/posix_acl_xattr.h). */
    struct { uint32_t version; struct { uint16_t tag, permissions; uint32_t id; } entry[5]; } acl = {
        2, { { 1, pick(8), -1 }, { 2, pick(8), 1000 }, { 4, pick(8), -1 }, { 16, pick(8), -1 }, { 32, pick(8), -1 } },
    };
    const char *attribute = chance(40) ? "system.posix_acl_default" : "system.posix_acl_access";
    printf("acl %s %s", path, attribute);
    if (chance(20)) result(removexattr(path, attribute));
    else result(setxattr(path, attribute, &acl, sizeof acl, 0));
}

static void times(const char *path)
{
    struct timespec when[2];
    for (int i = 0; i < 2; i++) {
        when[i].tv_sec = pick(900000000);
        when[i].tv_nsec = chance(15) ? UTIME_NOW : chance(15) ? UTIME_OMIT : (long)pick(1000000000);
    }
    printf("utimensat %s %ld %ld", path, when[1].tv_sec, when[1].tv_nsec);
    result(utimensat(AT_FDCWD, path, when, chance(50) ? AT_SYMLINK_NOFOLLOW : 0));
}

static void by_name(void)
{
    struct stat s;
    const char *path = name(), *other = name();
    unsigned flags;
    char text[4096];
    switch (pick(21)) {
    case 0: case 1: { mode_t m = mode(); printf("mkdir %s %o", path, m); result(mkdir(path, m)); break; }
    case 2: printf("rmdir %s", path); result(rmdir(path)); break;
    case 3: printf("unlink %s", path); result(unlink(path)); break;
    case 4: case 5:
        flags = chance(60) ? 0 : 1 + pick(2);
        printf("rename %s %s %u", path, other, flags);
        result(renameat2(AT_FDCWD, path, AT_FDCWD, other, flags));
        break;
    case 6:
        become(0); /* fs.protected_hardlinks is a matter of each system. */
        flags = chance(30) ? AT_SYMLINK_FOLLOW : 0;
        printf("link %s %s %x", path, other, flags);
        result(linkat(AT_FDCWD, path, AT_FDCWD, other, flags));
        break;
    case 7: { const char *target = targets[pick(LENGTH(targets))]; printf("symlink %s %s", target, path); result(symlink(target, path)); break; }
    case 8: {
        printf("readlink %s", path);
        ssize_t got = readlink(path, text, sizeof text);
        result(got);
        if (got > 0) printf(" %.*s", (int)got, text);
        break;
    }
    case 9: printf("lstat %s", path); result(lstat(path, &s) ? -1 : (describe(&s), 0)); break;
    case 10: printf("stat %s", path); result(stat(path, &s) ? -1 : (describe(&s), 0)); break;
    case 11: { mode_t m = mode(); printf("chmod %s %o", path, m); result(chmod(path, m)); break; }
    case 12: {
        int user = chance(30) ? -1 : (int)pick(2) * 1000, group = chance(30) ? -1 : (int)pick(3) * 1000;
        printf("chown %s %d:%d", path, user, group);
        /* Of what is not one's own this asks for nothing, and is answered for nothing. */
        if (user < 0 && group < 0) become(0);
        result(fchownat(AT_FDCWD, path, user, group, chance(50) ? AT_SYMLINK_NOFOLLOW : 0));
        break;
    }
    case 13: {
        off_t size = offset();
        printf("truncate %s %ld", path, (long)size);
        result(truncate(path, size));
        break;
    }
    case 14: list((printf("list %s", path), path)); break;
    case 15: { flags = pick(8); printf("access %s %u", path, flags); result(faccessat(AT_FDCWD, path, flags, AT_EACCESS)); break; }
    case 16: times(path); break;
    case 17: {
        const char *attribute = attributes[pick(LENGTH(attributes))];
        size_t size = chance(10) ? 3000 : pick(60);
        int how = chance(70) ? 0 : 1 + pick(2);
        fill(size);
        printf("setxattr %s %s %zu %d", path, attribute, size, how);
        result(lsetxattr(path, attribute, data, size, how));
        break;
    }
    case 18: {
        const char *attribute = attributes[pick(LENGTH(attributes))];
        printf("removexattr %s %s", path, attribute);
        result(lremovexattr(path, attribute));
        break;
    }
    case 19: printf("xattrs %s", path); attributes_of(path); break;
    default:
        if (chance(60)) { set_acl(path); break; }
        printf("mkfifo %s", path);
        result(mknod(path, (chance(70) ? S_IFIFO : S_IFSOCK) | mode(), 0));
    }
}

static void by_descriptor(void)
{
    unsigned slot = pick(FILES), other = pick(FILES);
    int fd = files[slot];
    struct stat s;
    off_t at = offset(), size;
    size_t count = length();
    if (fd < 0) { printf("nothing open"); return; }
    switch (pick(18)) {
    case 0: case 1: {
        printf("read %u %zu", slot, count);
        ssize_t got = read(fd, data, count);
        result(got);
        if (got > 0) printf(" %lx", (long)sum(data, got));
        break;
    }
    case 2: case 3: fill(count); printf("write %u %zu", slot, count); result(write(fd, data, count)); break;
    case 4: case 5: {
        printf("pread %u %zu %ld", slot, count, (long)at);
        ssize_t got = pread(fd, data, count, at);
        result(got);
        if (got > 0) printf(" %lx", (long)sum(data, got));
        break;
    }
    case 6: case 7:
        fill(count);
        printf("pwrite %u %zu %ld", slot, count, (long)at);
        result(pwrite(fd, data, count, at));
        break;
    case 8: {
        static const int whences[] = { SEEK_SET, SEEK_CUR, SEEK_END, SEEK_DATA, SEEK_HOLE };
        int whence = whences[pick(LENGTH(whences))];
        printf("lseek %u %ld %d", slot, (long)at, whence);
        if (whence > SEEK_END && strstr(left_out, "holes")) break;
        /* Of a directory these are the file system's own numbers. */
        if (is_regular(fd, &size)) result(lseek(fd, whence == SEEK_CUR ? at / 8 - 9000 : at, whence));
        break;
    }
    case 9: printf("ftruncate %u %ld", slot, (long)at); result(ftruncate(fd, at)); break;
    case 10: {
        static const int how[] = { 0, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE,
                                   FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE };
        int which = how[pick(LENGTH(how))];
        printf("fallocate %u %x %ld+%zu", slot, which, (long)at, count);
        result(fallocate(fd, which, at, count));
        break;
    }
    case 11: printf("map %u", slot); map(fd); break;
    case 12: printf("copy_file_range %u %u", slot, other); copy(fd, files[other], 0); break;
    case 13: printf("sendfile %u %u", slot, other); copy(fd, files[other], 1); break;
    case 14: printf("fstat %u", slot); result(fstat(fd, &s) ? -1 : (describe(&s), 0)); break;
    case 15: { mode_t m = mode(); printf("fchmod %u %o", slot, m); result(fchmod(fd, m)); break; }
    case 16: printf("fsync %u", slot); result(chance(50) ? fsync(fd) : fdatasync(fd)); break;
    default:
        if (chance(40)) { printf("dup %u", slot); keep(dup(fd)); break; }
        printf("close %u", slot);
        result(close(fd));
        files[slot] = -1;
    }
}

/* Something to begin with. */
static void skeleton(void)
{
    if (system("rm -rf ./a ./b ./c ./d ./f ./l && mkdir -p d/e && chmod 777 d d/e && echo a > a && echo b > d/b")) _exit(98);
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "tree")) { tree(argv[2], "."); return 0; }
    /* One below, so that links to what is above lead nowhere else. */
    if (argc < 4 || chdir(argv[3]) || mkdir("work", 0777) || chmod("work", 0777) || chdir("work")) {
        perror("randomfs SEED COUNT DIR");
        return 2;
    }
    if (argc == 5) left_out = argv[4];
    state = strtoull(argv[1], NULL, 0);
    long count = atol(argv[2]);
    /* FUSE tells the groups of a caller only where something is made, and Linux before 6.3 not even there. */
    gid_t group = 3000;
    setgroups(1, &group);
    signal(SIGPIPE, SIG_IGN);
    for (unsigned i = 0; i < FILES; i++) files[i] = -1;
    umask(022);
    skeleton();
    for (long i = 0; i < count; i++) {
        unsigned user = chance(25) ? 1000 * (1 + pick(2)) : 0;
        if (chance(2)) umask(pick(3) * 011);
        printf("%ld: ", i);
        if (user) printf("as %u: ", user);
        become(user);
        unsigned what = pick(100);
        if (what < 20) open_one();
        else if (what < 22 && !strstr(left_out, "tmpfile")) temporary();
        else if (what < 60) by_name();
        else by_descriptor();
        printf("\n");
        become(0);
        /* So that it does not fill up, and directories are open to all again. */
        if (i % 50 == 49) { chmod(".", 0777); (void)!chmod("d", 0777); }
        if (i % 400 == 399) skeleton();
    }
    for (unsigned i = 0; i < FILES; i++) if (files[i] >= 0) close(files[i]);
    tree("..", ".");
    return 0;
}
