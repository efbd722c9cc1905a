"""Work in the background: its progress, its end, and stopping it."""

import threading

from dgemma.errors import DgemmaError
from dgemma.studio.jobs import KEPT, Job, Jobs, Progress
from dgemma.studio.widgets.work import progress_text
from support.clock import Clock


def test_a_job_says_how_far_it_is_and_what_became_of_it():
    clock = Clock()

    def work(job):
        job.begin("downloading", 100, 1100)
        clock.now += 2
        job.advance(600)
        return "all here"

    job = Job("a model", work, clock.monotonic)
    job.start()
    job.join(5)
    assert (job.state, job.result) == ("done", "all here")
    assert (job.progress.per_second, job.progress.seconds_left) == (250, 2)


def test_a_job_that_is_stopped_ends_at_its_next_piece():
    began, go = threading.Event(), threading.Event()

    def work(job):
        job.begin("downloading", 0, 10)
        began.set()
        go.wait(5)
        job.advance(5)
        raise AssertionError("it went on")

    jobs = Jobs()
    job = jobs.start("a model", work)
    began.wait(5)
    job.stop()
    go.set()
    job.join(5)
    assert job.state == "stopped"


def test_what_goes_wrong_is_told():
    def refuse(job):
        raise DgemmaError("the disk is full")

    def fail(job):
        raise KeyError("x")

    jobs = Jobs()
    for title, work in (("refused", refuse), ("failed", fail)):
        jobs.start(title, work).join(5)
    assert [(job.state, job.result) for job in jobs.all()] == [
        ("failed", "KeyError: 'x'"), ("failed", "the disk is full")]


def test_the_same_thing_is_not_begun_twice_and_old_ones_are_forgotten():
    go = threading.Event()
    jobs = Jobs()

    def wait(job):
        go.wait(5)
        return ""

    first = jobs.start("a model", wait)
    assert jobs.start("a model", wait) is first
    go.set()
    first.join(5)
    for number in range(KEPT + 5):
        jobs.start(f"number {number}", wait).join(5)
    assert len(jobs.all()) == KEPT + 1
    jobs.forget(jobs.all()[0])
    assert len(jobs.all()) == KEPT


def test_closing_stops_everything():
    jobs = Jobs()

    def work(job):
        while True:
            job.advance(1)

    job = jobs.start("endless", work)
    jobs.close()
    assert job.state == "stopped"


def test_progress_in_words():
    assert progress_text(Progress()) == "beginning …"
    assert progress_text(Progress("downloading a.gguf", 3_000_000_000, 16_800_000_000, 20e6, "trying again")) == (
        "downloading a.gguf: 3.0 GB of 16.8 GB, 20.0 MB/s, 12 min left (trying again)")
