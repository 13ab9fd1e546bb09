"""Whether principal directions mean anything: components against random and learned directions at equal KL."""

from steering.command_line import main

if __name__ == "__main__":
    main("principal")
