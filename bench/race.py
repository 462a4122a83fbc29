"""Ours and its peers take turns, each in a process of its own, with its own settings and memory."""
import multiprocessing
import statistics


def race(racers, rounds=5):
    """Figures of each of `racers`, {name: (generator function, arguments)}: {name: [figure of each round]}.

    A generator prepares, then yields a figure each time that it is asked. The first, in which it warms up,
    does not count."""
    spawn = multiprocessing.get_context("spawn")
    pipes = {name: spawn.Pipe() for name in racers}
    processes = [spawn.Process(target=run, args=(pipes[name][1], *racer), daemon=True)
                 for name, racer in racers.items()]
    for process in processes: process.start()
    for _, theirs in pipes.values(): theirs.close()         # so that one that fails is noticed
    figures = {name: [ask(ours)] for name, (ours, _) in pipes.items()}
    for _ in range(rounds):
        for name, (ours, _) in pipes.items(): figures[name].append(ask(ours))
    for process in processes: process.terminate()
    return {name: found[1:] for name, found in figures.items()}


def ask(pipe):
    pipe.send("go")
    return pipe.recv()


def run(pipe, racer, args):
    from sifar.log import quiet_imports
    quiet_imports()
    figures = racer(*args)
    while pipe.recv(): pipe.send(next(figures))


def ratio(ours, peer):
    "The median of the ratios of two racers, round by round."
    return statistics.median(a / b for a, b in zip(ours, peer))
