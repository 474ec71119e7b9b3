"""kill -9, full disks and clocks that jump: `python -m scripts.faults`.

clock            The system's clock a year back, a year ahead, and jumping in the middle
clock_server     A server whose clock jumps: answers, deadlines
forked_commands  convert, export and run on a tiny model
kills            kill -9 and SIGTERM at random moments: what lies there is whole
tries            One try: a forked child does something, and is struck down in the middle of it
unwritable       Places that cannot be written to: full disks, read-only directories
"""
