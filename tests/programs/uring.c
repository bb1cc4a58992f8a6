/* uring ADDRESS PORT TEXT: connects, sends and receives by io_uring alone, with raw system calls. */
#include "guest.h"
#include <linux/io_uring.h>

static int ring;
static unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
static struct io_uring_sqe *sqes;
static struct io_uring_cqe *cqes;

static int one(struct io_uring_sqe sqe) {
    unsigned tail = *sq_tail, index = tail & *sq_mask;
    sqes[index] = sqe;
    sq_array[index] = index;
    __atomic_store_n(sq_tail, tail + 1, __ATOMIC_RELEASE);
    if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, 0, 0) < 0) return -errno;
    unsigned head = *cq_head;
    while (head == __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE)) sched_yield();
    int got = cqes[head & *cq_mask].res;
    __atomic_store_n(cq_head, head + 1, __ATOMIC_RELEASE);
    return got;
}

static const char *named(int rc) {
    if (rc < 0) return strerrorname_np(-rc);
    static char text[16];
    snprintf(text, 16, "%d", rc);
    return text;
}

int main(int argc, char **argv) {
    struct io_uring_params p = {0};
    ring = syscall(SYS_io_uring_setup, 8, &p);
    printf("io_uring_setup %s\n", ring < 0 ? strerrorname_np(errno) : "works");
    if (ring < 0) return 3;
    char *sq = mmap(0, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    char *cq = mmap(0, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_CQ_RING);
    sqes = mmap(0, p.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    sq_tail = (void *)(sq + p.sq_off.tail), sq_mask = (void *)(sq + p.sq_off.ring_mask), sq_array = (void *)(sq + p.sq_off.array);
    cq_head = (void *)(cq + p.cq_off.head), cq_tail = (void *)(cq + p.cq_off.tail), cq_mask = (void *)(cq + p.cq_off.ring_mask);
    cqes = (void *)(cq + p.cq_off.cqes);
    struct address a = to(argv[1], atoi(argv[2]));
    int fd = socket(a.storage.ss_family, SOCK_STREAM, 0);
    printf("connect %s\n", named(one((struct io_uring_sqe){.opcode = IORING_OP_CONNECT, .fd = fd, .addr = (uint64_t)&a.storage, .off = a.length})));
    char out[65536], in[65536];
    long total = 0;
    memset(out, 'u', sizeof out);
    out[0] = 'e';
    for (int i = 0; i < 20; i++) {
        int sent = one((struct io_uring_sqe){.opcode = IORING_OP_SEND, .fd = fd, .addr = (uint64_t)out, .len = 10000, .msg_flags = MSG_NOSIGNAL});
        if (sent != 10000) return printf("send %s\n", named(sent)), 1;
        out[0] = 'u';
        int want = i ? 10000 : 9999;
        for (int got = 0; got < want;) {
            int n = one((struct io_uring_sqe){.opcode = IORING_OP_RECV, .fd = fd, .addr = (uint64_t)in, .len = want - got});
            if (n <= 0) return printf("recv %s\n", named(n)), 1;
            got += n, total += n;
        }
    }
    printf("echoed %ld\n", total);
    shutdown(fd, SHUT_WR);
    printf("end %s\n", named(one((struct io_uring_sqe){.opcode = IORING_OP_RECV, .fd = fd, .addr = (uint64_t)in, .len = 100})));
    int refused = socket(AF_INET, SOCK_STREAM, 0);
    struct address b = to(ORIGIN, 9);
    printf("refused %s\n", named(one((struct io_uring_sqe){.opcode = IORING_OP_CONNECT, .fd = refused, .addr = (uint64_t)&b.storage, .off = b.length})));
    return 0;
}
