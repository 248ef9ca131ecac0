/* Counts the file operations of a process below one directory, and at the n-th kills it, stops it or lets it fail.

   Loaded with LD_PRELOAD, so that what Rust (safetensors), C++ (torch) and Pillow write counts as what Python writes.
   Inactive until `faults_arm`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, KILL_BEFORE, KILL_AFTER, FAIL, FAIL_FROM_THERE_ON, SIGNAL };
enum { CREATES = 1, OTHER = 2 };  /* a full disk lets only the first fail */

static char root[PATH_MAX];
static size_t root_length;
static char kinds[256];
static long at;
static int action, number, reads, armed, trace = -1;
static atomic_long count;
static atomic_int is_full;

/* below: absolute. where: from 1. what: an action. code: errno, or the signal. of_kinds: those that count, between
   spaces. log: file that gets a line for each operation. */
void faults_arm(const char *below, long where, int what, int code, const char *of_kinds, int log) {
  snprintf(root, sizeof root, "%s", below);
  snprintf(kinds, sizeof kinds, " %s ", of_kinds);
  root_length = strlen(root);
  at = where, action = what, number = code, reads = strstr(kinds, " read ") != NULL, trace = log;
  atomic_store(&count, 0);
  armed = 1;
}

static int is_below(const char *path) {
  return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int resolved(int dirfd, const char *path, char *out) {
  char start[PATH_MAX] = "", link[64];
  if (!path) return 0;
  if (path[0] != '/') {
    if (dirfd == AT_FDCWD) {
      if (!getcwd(start, sizeof start)) return 0;
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
      ssize_t length = readlink(link, start, sizeof start - 1);
      if (length < 0) return 0;
      start[length] = 0;
    }
    strncat(start, "/", sizeof start - strlen(start) - 1);
  }
  return snprintf(out, PATH_MAX, "%s%s", start, path) < PATH_MAX && is_below(out);
}

static int described(int fd, char *out) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, out, PATH_MAX - 1);
  if (length < 0) return 0;
  out[length] = 0;
  return is_below(out);
}

static void note(const char *mark, long n, const char *kind, const char *path) {
  char line[PATH_MAX + 64];
  int saved = errno, length = snprintf(line, sizeof line, "%s%ld %s %s\n", mark, n, kind, path);
  if (trace >= 0) syscall(SYS_write, trace, line, (size_t)length);
  errno = saved;
}

/* Whether the operation fails, with errno set. *then: whether the process is to be killed after it. */
static int met(const char *kind, const char *path, int creates, int *then) {
  char word[64];
  if (atomic_load(&is_full) && creates == CREATES) { errno = number; return 1; }
  snprintf(word, sizeof word, " %s ", kind);
  if (!strstr(kinds, word)) return 0;
  long n = atomic_fetch_add(&count, 1) + 1;
  note("", n, kind, path);
  if (n != at) return 0;
  note("HIT ", n, kind, path);
  switch (action) {
    case KILL_BEFORE: syscall(SYS_kill, getpid(), SIGKILL); break;
    case KILL_AFTER: *then = 1; break;
    case SIGNAL: syscall(SYS_kill, getpid(), number); break;
    case FAIL: errno = number; return 1;
    case FAIL_FROM_THERE_ON:
      atomic_store(&is_full, 1);
      if (creates == CREATES) { errno = number; return 1; }
  }
  return 0;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define DO(kind, path, creates, failed, call)                                         \
  int then = 0;                                                                       \
  if (met(kind, path, creates, &then)) return failed;                                 \
  __typeof__(call) result = call;                                                     \
  if (then) { syscall(SYS_kill, getpid(), SIGKILL); }                                 \
  return result

#define OPEN(name, dirfd, path, flags, mode, call)                                    \
  char whole[PATH_MAX];                                                               \
  int writes = ((flags) & O_ACCMODE) != O_RDONLY || (flags) & (O_CREAT | O_TRUNC);    \
  if (!armed || !(writes || reads) || (flags) & O_DIRECTORY || !resolved(dirfd, path, whole)) return call; \
  DO(writes ? "open" : "open-to-read", whole, (flags) & (O_CREAT | O_TRUNC) ? CREATES : OTHER, -1, call)

#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }

int open(const char *path, int flags, ...) { MODE REAL(open); OPEN(open, AT_FDCWD, path, flags, mode, real(path, flags, mode)); }
int open64(const char *path, int flags, ...) { MODE REAL(open64); OPEN(open64, AT_FDCWD, path, flags, mode, real(path, flags, mode)); }
int openat(int dir, const char *path, int flags, ...) { MODE REAL(openat); OPEN(openat, dir, path, flags, mode, real(dir, path, flags, mode)); }
int openat64(int dir, const char *path, int flags, ...) { MODE REAL(openat64); OPEN(openat64, dir, path, flags, mode, real(dir, path, flags, mode)); }

#define FOPEN(name)                                                                                       \
  FILE *name(const char *path, const char *how) {                                                         \
    REAL(name);                                                                                           \
    char whole[PATH_MAX];                                                                                 \
    int writes = strpbrk(how, "wa+") != NULL;                                                             \
    if (!armed || !(writes || reads) || !resolved(AT_FDCWD, path, whole)) return real(path, how);         \
    DO(writes ? "open" : "open-to-read", whole, writes ? CREATES : OTHER, NULL, real(path, how));         \
  }
FOPEN(fopen)
FOPEN(fopen64)

/* Written in halves, so that a kill or a full disk leaves a part. */
#define WRITE(kind, length, half, call)                                               \
  char whole[PATH_MAX];                                                               \
  if (!armed || !described(fd, whole)) return call;                                   \
  int then = 0;                                                                       \
  if (met(kind, whole, CREATES, &then)) {                                             \
    return -1;                                                                        \
  }                                                                                   \
  if (then && (length) > 1) { half; syscall(SYS_kill, getpid(), SIGKILL); }           \
  ssize_t result = call;                                                              \
  if (then) syscall(SYS_kill, getpid(), SIGKILL);                                     \
  return result

ssize_t write(int fd, const void *data, size_t size) { REAL(write); WRITE("write", size, real(fd, data, size / 2), real(fd, data, size)); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t o) { REAL(pwrite); WRITE("write", size, real(fd, data, size / 2, o), real(fd, data, size, o)); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t o) { REAL(pwrite64); WRITE("write", size, real(fd, data, size / 2, o), real(fd, data, size, o)); }
ssize_t writev(int fd, const struct iovec *parts, int num) { REAL(writev); WRITE("write", num, real(fd, parts, num / 2), real(fd, parts, num)); }
ssize_t sendfile(int fd, int in, off_t *o, size_t size) {
  ssize_t (*real)(int, int, off_t *, size_t) = dlsym(RTLD_NEXT, "sendfile");
  WRITE("write", size, real(fd, in, o, size / 2), real(fd, in, o, size));
}
ssize_t sendfile64(int fd, int in, off64_t *o, size_t size) {
  ssize_t (*real)(int, int, off64_t *, size_t) = dlsym(RTLD_NEXT, "sendfile64");
  WRITE("write", size, real(fd, in, o, size / 2), real(fd, in, o, size));
}
ssize_t copy_file_range(int in, off64_t *i, int fd, off64_t *o, size_t size, unsigned flags) {
  REAL(copy_file_range);
  WRITE("write", size, real(in, i, fd, o, size / 2, flags), real(in, i, fd, o, size, flags));
}
ssize_t read(int fd, void *data, size_t size) {
  REAL(read);
  char whole[PATH_MAX];
  if (!armed || !reads || !described(fd, whole)) return real(fd, data, size);
  DO("read", whole, OTHER, -1, real(fd, data, size));
}
ssize_t pread64(int fd, void *data, size_t size, off64_t o) {
  REAL(pread64);
  char whole[PATH_MAX];
  if (!armed || !reads || !described(fd, whole)) return real(fd, data, size, o);
  DO("read", whole, OTHER, -1, real(fd, data, size, o));
}

#define ON_FD(kind, creates, call)                                                    \
  char whole[PATH_MAX];                                                               \
  if (!armed || !described(fd, whole)) return call;                                   \
  DO(kind, whole, creates, -1, call)

int fsync(int fd) { REAL(fsync); ON_FD("fsync", OTHER, real(fd)); }
int fdatasync(int fd) { REAL(fdatasync); ON_FD("fsync", OTHER, real(fd)); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); ON_FD("truncate", OTHER, real(fd, size)); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); ON_FD("truncate", OTHER, real(fd, size)); }
int fchmod(int fd, mode_t mode) { REAL(fchmod); ON_FD("chmod", OTHER, real(fd, mode)); }

static int allocated(int fd, int (*real)(int, off64_t, off64_t), off64_t start, off64_t size) {  /* returns an errno */
  char whole[PATH_MAX];
  if (!armed || !described(fd, whole)) return real(fd, start, size);
  DO("allocate", whole, CREATES, errno, real(fd, start, size));
}
int posix_fallocate(int fd, off_t start, off_t size) { REAL(posix_fallocate); return allocated(fd, (void *)real, start, size); }
int posix_fallocate64(int fd, off64_t start, off64_t size) { REAL(posix_fallocate64); return allocated(fd, real, start, size); }

#define ON_PATH(kind, dir, path, creates, call)                                       \
  char whole[PATH_MAX];                                                               \
  if (!armed || !resolved(dir, path, whole)) return call;                             \
  DO(kind, whole, creates, -1, call)

int rename(const char *from, const char *to) { REAL(rename); ON_PATH("rename", AT_FDCWD, to, OTHER, real(from, to)); }
int renameat(int a, const char *from, int b, const char *to) { REAL(renameat); ON_PATH("rename", b, to, OTHER, real(a, from, b, to)); }
int unlink(const char *path) { REAL(unlink); ON_PATH("unlink", AT_FDCWD, path, OTHER, real(path)); }
int unlinkat(int dir, const char *path, int flags) { REAL(unlinkat); ON_PATH("unlink", dir, path, OTHER, real(dir, path, flags)); }
int rmdir(const char *path) { REAL(rmdir); ON_PATH("rmdir", AT_FDCWD, path, OTHER, real(path)); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); ON_PATH("mkdir", AT_FDCWD, path, CREATES, real(path, mode)); }
int mkdirat(int dir, const char *path, mode_t mode) { REAL(mkdirat); ON_PATH("mkdir", dir, path, CREATES, real(dir, path, mode)); }
int link(const char *from, const char *to) { REAL(link); ON_PATH("link", AT_FDCWD, to, CREATES, real(from, to)); }
int symlink(const char *from, const char *to) { REAL(symlink); ON_PATH("link", AT_FDCWD, to, CREATES, real(from, to)); }
int chmod(const char *path, mode_t mode) { REAL(chmod); ON_PATH("chmod", AT_FDCWD, path, OTHER, real(path, mode)); }
int fchmodat(int dir, const char *path, mode_t mode, int flags) { REAL(fchmodat); ON_PATH("chmod", dir, path, OTHER, real(dir, path, mode, flags)); }
