import os
import signal

from tests.data.test_module import make


def test_a_signal_to_the_group_ends_no_worker_that_starts_and_one_to_a_worker_ends_it(tmp_path, words, monkeypatch):
    from torch.utils.data._utils import signal_handling

    start = signal_handling._set_worker_signal_handlers

    def signalled():  # first thing in a worker, which is still of the group
        start()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)

    data, whole = make(tmp_path, words, num_workers=2), make(tmp_path, words)
    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", signalled)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    loader = data.val_dataloader()
    got = [batch["input_ids"].tolist() for batch in loader]
    assert got == [batch["input_ids"].tolist() for batch in whole.val_dataloader()]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    for worker in loader._iterator._workers:
        worker.terminate()
        worker.join(60)
        assert worker.exitcode is not None
    loader._iterator = None
