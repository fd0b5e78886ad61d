"""The HTTP routes of the service's methods: one table for the server and for the client.

A path parameter is named as the method's argument is. `reference` may hold a slash (`team/name`).
"""

ROUTES: dict[str, tuple[str, str]] = {
    "status": ("GET", "/status"),
    "submit": ("POST", "/tasks"),
    "tasks": ("GET", "/tasks"),
    "task": ("GET", "/tasks/{reference:path}"),
    "cancel": ("POST", "/cancel/{reference:path}"),
    "preempt": ("POST", "/preempt/{reference:path}"),
    "logs": ("GET", "/logs/{reference:path}"),
    "versions": ("GET", "/versions"),
    "version": ("GET", "/versions/{number}"),
    "diff": ("GET", "/diff/{old}/{new}"),
    "rollback": ("POST", "/rollback/{version}"),
    "change": ("POST", "/store"),
    "export": ("GET", "/export/{reference:path}"),
    "scores": ("GET", "/scores"),
}
