"""Work in a thread that is not the main one."""

import threading


def in_thread(work):
    """What a function returns, or raises, in a thread that is not the main one."""
    outcome = []

    def run():
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
