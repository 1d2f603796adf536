// CPUs that this machine does not have, for slurm/local_cluster.sh --bind: preloaded into slurmd and
// into the tasks of jobs, so that each process sees those that Slurm's task/affinity has bound it to.
//
// A process's set lies in the folder PRETENDED_CPUS_IN, under its number and its start; one that has
// none has its parent's. Nothing is bound in truth.
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// The file of a process's set; returns the number of its parent, 0 where there is none.
static int look_up(int pid, char *file, size_t size) {
  char path[32], text[1024], *after;
  unsigned long long start = 0;
  int parent = 0;
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  int stat = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t length = stat < 0 ? -1 : read(stat, text, sizeof text - 1);
  if (stat >= 0) close(stat);
  if (length > 0) {
    text[length] = 0;
    after = strrchr(text, ')');  // a name may hold anything
    sscanf(after + 1, " %*c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
           &parent, &start);
  }
  snprintf(file, size, "%s/%d.%llu", getenv("PRETENDED_CPUS_IN"), pid, start);
  return parent;
}

int sched_setaffinity(pid_t pid, size_t size, const cpu_set_t *cpus) {
  char file[4096];
  look_up(pid ? pid : getpid(), file, sizeof file);
  int set = open(file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (set < 0) return -1;
  ssize_t written = write(set, cpus, size);
  close(set);
  return written == (ssize_t)size ? 0 : -1;
}

int sched_getaffinity(pid_t pid, size_t size, cpu_set_t *cpus) {
  char file[4096];
  memset(cpus, 0, size);
  for (int process = pid ? pid : getpid(); process > 0;) {
    int parent = look_up(process, file, sizeof file);
    int set = open(file, O_RDONLY | O_CLOEXEC);
    if (set >= 0) {
      ssize_t length = read(set, cpus, size);
      close(set);
      return length > 0 ? 0 : -1;
    }
    process = parent;
  }
  for (int cpu = 0; cpu < atoi(getenv("PRETENDED_CPUS")); cpu++) CPU_SET_S(cpu, size, cpus);
  return 0;
}
