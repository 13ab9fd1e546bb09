"""The server of the pages, for this machine alone: app.py has the routes, serve.py is the command."""
