"""Whether principal directions mean anything: components against random and learned directions at equal KL."""

from steering.command_line import principal_directions

if __name__ == "__main__":
    principal_directions()
