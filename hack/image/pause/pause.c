/* Holds a Pod's namespaces: sleeps, collects orphaned children, ends on TERM. */
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int signal) {
    (void)signal;
    _exit(0);
}

static void reap(int signal) {
    (void)signal;
    while (waitpid(-1, NULL, WNOHANG) > 0) {
    }
}

int main(void) {
    /* As pid 1 of its namespace it would ignore signals it has no handler for. */
    if (sigaction(SIGTERM, &(struct sigaction){.sa_handler = end}, NULL) < 0 ||
        sigaction(SIGINT, &(struct sigaction){.sa_handler = end}, NULL) < 0 ||
        sigaction(SIGCHLD, &(struct sigaction){.sa_handler = reap, .sa_flags = SA_NOCLDSTOP}, NULL) < 0) {
        return 1;
    }
    for (;;) {
        pause();
    }
}
