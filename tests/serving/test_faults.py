"""Workers that lie, go and come back: who needs them is told, nobody gets a wrong text, the server lives."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from rogues import serving
from served import Model
from server import LIMIT, Paced, slip_serve, until
from sliplm.parties.chain import verify
from sliplm.serving import run
from sliplm.serving.limits import Limits
from sliplm.shares.share import open_worker

PROMPT, MOST = "The vault", 100


def test_lies_deaths_returns_and_a_kill(model: Model, tmp_path: Path) -> None:
    liar, honest, back = (Paced(open_worker(model.out / "worker")) for _ in range(3))
    liar.lies = True
    audit, truth = tmp_path / "audit.jsonl", model.text(PROMPT, MOST)
    with serving(liar, tmp_path / "liar") as lying, ExitStack() as others:
        place = others.enter_context(serving(honest, tmp_path / "honest"))
        with slip_serve(
            model.out, tmp_path, "--audit", str(audit), "--fallback", "fail", workers=[lying, place]
        ) as server:
            client = server.client()

            def ask(**more: Any) -> Any:
                return client.completions.create(
                    model="tiny", prompt=PROMPT, max_tokens=MOST, temperature=0, **more
                )

            assert ask().choices[0].text == truth  # the liar is asked first
            assert '"event":"quarantined"' in audit.read_text()
            assert 'event="quarantined"' in server.get("/metrics").text
            for figure in ("failed_checks_total", "quarantines_total"):
                lines = server.get("/metrics").text.splitlines()
                counted = [line for line in lines if line.startswith(f"sliplm:{figure}{{")]
                assert {lying in line: line.rpartition(" ")[2] for line in counted} == {
                    True: "1.0", False: "0.0"
                }  # fmt: skip

            honest.pause = 0.01
            stream = ask(stream=True)
            pieces = [next(stream).choices[0].text]
            others.close()  # the last one goes
            with pytest.raises(openai.APIError, match="no worker serves now"):
                pieces.extend(chunk.choices[0].text for chunk in stream)
            text = "".join(pieces)
            assert truth.startswith(text)
            assert text != truth
            with pytest.raises(openai.InternalServerError, match="no worker serves now"):
                ask()
            with pytest.raises(openai.InternalServerError, match="no worker serves now"):
                ask(stream=True)  # as a status, since nothing was sent
            until(lambda: server.get("/ready").status_code == 503)
            assert server.get("/health").status_code == 200
            assert server.figure("sliplm:num_requests_running") == 0

            others.enter_context(serving(back, tmp_path / "honest"))
            until(lambda: server.get("/ready").status_code == 200)
            assert ask().choices[0].text == truth

            before = Limits()
            run.replay(audit, before)
            back.pause = 0.01
            stream = ask(stream=True)
            next(stream)
            server.process.kill()  # what was under way counts with all that it might have taken
            server.process.wait(LIMIT)
            after = Limits()
            run.replay(audit, after)
            [(_, had)], [(_, has)] = before.used().values(), after.used().values()
            assert has - had == len(PROMPT) + MOST
    head, _ = verify(audit)
    assert head.broken is None
    assert head.lines > 5
