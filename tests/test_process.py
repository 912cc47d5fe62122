import time
from multiprocessing import util

from sdopt.bench import process


def ends_slowly(state, tell, file):
    util.Finalize(None, lambda: (time.sleep(0.3), file.touch()), exitpriority=1)


def test_a_process_that_is_let_go_ends_by_itself_and_is_waited_for(tmp_path):
    joined, left = tmp_path / "joined", tmp_path / "left"
    with process.Fresh(process.context("cpu"), ahead=False) as fresh:
        for file in (joined, left):
            worker = fresh.take()
            worker.call(ends_slowly, file)
            fresh.let_go(worker)
            assert not file.exists(), "the caller does not wait for it"
            if file is joined:
                fresh.join()
                assert file.exists()
    assert left.exists(), "at the end all are waited for"
