"""A bar shows how far the work is, in a notebook as in a terminal, and how it ended."""

from __future__ import annotations

import re
import threading

import pytest

from ptychodask import progress
from ptychodask.progress import NotebookBar, progress_bar


def state(markup):
    """(done, total) of a bar's element."""
    return tuple(int(value) for value in re.search(r'value="(\d+)" max="(\d+)"', markup).groups())


def test_a_bar_shows_how_far_it_is_and_how_it_ended(monkeypatch):
    monkeypatch.setattr(progress, "NOTEBOOK_REFRESH_S", 0.0)
    shown = []
    bar = NotebookBar("read", 3, "patterns", shown.append)
    for _ in range(3):
        bar.advance()
    bar.finish()
    assert [state(each) for each in shown] == [(1, 3), (2, 3), (3, 3), (3, 3)]
    assert "3/3 patterns" in shown[-1]


def test_a_bar_is_drawn_now_and_then_and_in_the_end(monkeypatch):
    monkeypatch.setattr(progress, "NOTEBOOK_REFRESH_S", 3600.0)
    shown = []
    bar = NotebookBar("read", 1000, "patterns", shown.append)
    for _ in range(1000):
        bar.advance()
    assert [state(each) for each in shown] == [(1, 1000)]
    bar.finish()
    assert state(shown[-1]) == (1000, 1000)


def test_threads_share_a_bar(monkeypatch):
    shown = []
    bar = NotebookBar("read", 4000, "patterns", shown.append)
    threads = [threading.Thread(target=lambda: [bar.advance() for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bar.finish()
    assert state(shown[-1]) == (4000, 4000)


def test_totals_are_corrected_and_notes_are_escaped():
    shown = []
    bar = NotebookBar("<b>", 0, "<i>", shown.append)
    assert state(bar.markup()) == (0, 1)
    bar.expect(7)
    bar.note("loss < 1")
    bar.finish()
    assert state(shown[-1]) == (0, 7)
    assert "<b>" not in shown[-1]
    assert "<i>" not in shown[-1]
    assert "loss &lt; 1" in shown[-1]


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook is sent: HTML, whether it replaces what has its name, its name."""
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell")
    displaypub = pytest.importorskip("IPython.core.displaypub")
    shell = interactiveshell.InteractiveShell.instance()
    monkeypatch.setattr(shell, "display_pub", displaypub.CapturingDisplayPublisher(shell=shell))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    yield lambda: [
        (sent["data"]["text/html"], sent["update"], sent["transient"]["display_id"])
        for sent in shell.display_pub.outputs
    ]
    interactiveshell.InteractiveShell.clear_instance()


def test_a_notebook_has_one_bar_that_is_replaced_until_it_is_done(notebook):
    with progress_bar("read", 5, "patterns") as bar:
        bar.advance(5)
    sent = notebook()
    assert [update for _, update, _ in sent] == [False] + [True] * (len(sent) - 1)
    assert len({name for *_, name in sent}) == 1
    assert state(sent[-1][0]) == (5, 5)


def test_a_bar_stays_where_an_error_stopped_it(notebook):
    def stopped():
        with progress_bar("read", 5, "patterns") as bar:
            bar.advance(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert state(notebook()[-1][0]) == (2, 5)


def test_nothing_is_shown_where_nobody_looks(capsys):
    with progress_bar("read", 5, "patterns") as bar:
        bar.advance(5)
        bar.expect(6)
        bar.note("a")
    assert capsys.readouterr() == ("", "")
