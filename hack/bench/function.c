/* A function that does nothing: answers each request on port 8080 at once, and keeps the connection. */
#include <netinet/in.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static const char answer[] = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/* Requests have no body, and come one after the other. */
static void serve(int client) {
    char request[4096];
    size_t have = 0;
    ssize_t got;
    while (have < sizeof request - 1 && (got = read(client, request + have, sizeof request - 1 - have)) > 0) {
        have += (size_t)got;
        request[have] = 0;
        if (strstr(request, "\r\n\r\n") != NULL) {
            if (write(client, answer, sizeof answer - 1) < 0) {
                return;
            }
            have = 0;
        }
    }
}

int main(void) {
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(8080)};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&any, sizeof any) < 0 || listen(listener, 16) < 0) {
        return 1;
    }
    /* Nobody asks how those that serve have ended. */
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int client = accept(listener, NULL, NULL);
        if (client >= 0 && fork() == 0) {
            serve(client);
            _exit(0);
        }
        close(client);
    }
}
