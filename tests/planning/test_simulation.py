"""The model of a step: who waits for whom."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from ciphertune.planning.simulation import MicroBatch, Network, Product, Request, Timeline, simulate

FAST = Network(bandwidth=1e9, latency=0.0)


def request(*workers: int, encrypt: float = 1.0, up: int = 0, evaluate: float = 4.0, down: int = 0) -> Request:
    return Request(workers or (0,), encrypt, up, evaluate, down, 1.0)


def step(*products: tuple[Request, ...], rest: float = 0.0) -> MicroBatch:
    return MicroBatch([Product(rest, requests) for requests in products])


def seconds(batches: list[MicroBatch], interleave: int = 1, workers: int = 1, network: Network = FAST) -> float:
    timeline = simulate(batches, interleave, workers, network)
    held_together(timeline)
    return timeline.seconds


def held_together(timeline: Timeline) -> None:
    """Nobody does two things at once, and what the step waited for fills it."""
    assert sum(timeline.critical().values()) == pytest.approx(timeline.seconds)
    for whats, worker in [(("rest", "encrypt", "decrypt"), -1), *((("evaluate",), w) for w in range(timeline.workers))]:
        own = sorted((a.start, a.end) for a in timeline.activities if a.what in whats and a.worker == worker)
        assert all(before[1] <= after[0] + 1e-9 for before, after in itertools.pairwise(own))
    for activity in timeline.activities:
        assert (
            activity.cause < 0
            or timeline.activities[activity.cause].end <= activity.start + 1e-9
            or (activity.what in ("uplink", "downlink"))
        )


def test_one_after_the_other_it_is_a_sum() -> None:
    network = Network(bandwidth=10.0, latency=0.25)
    one = (request(up=20, down=5),)
    # Each product: 3 s of its own, encryption 1, up 2, there 0.25, evaluation 4, back 0.25, down 0.5, decryption 1.
    assert seconds([step(one, one, rest=3.0)], network=network) == pytest.approx(2 * 12.0)
    timeline = simulate([step(one, one, rest=3.0)], 1, 1, network, closing=7.0)
    assert timeline.seconds == pytest.approx(31.0)
    assert timeline.critical() == pytest.approx(
        {"rest": 13.0, "encrypt": 2.0, "decrypt": 2.0, "evaluate": 8.0, "uplink": 4.0, "downlink": 1.0, "latency": 1.0}
    )


def test_rows_are_evaluated_at_the_same_time_and_sent_one_after_the_other() -> None:
    network = Network(bandwidth=10.0, latency=0.0)
    halves = (request(0, up=10, evaluate=4.0), request(1, encrypt=0.0, up=10, evaluate=4.0))
    # Encrypted at 1, up at 2 and 3, evaluated at 6 and 7, decrypted at 7 and 8.
    assert seconds([step(halves)], workers=2, network=network) == pytest.approx(8.0)
    shared = dataclasses.replace(network, processors="shared by workers")
    # The second waits for the first: evaluated at 6 and 10.
    assert seconds([step(halves)], workers=2, network=shared) == pytest.approx(11.0)


def test_who_shares_a_processor_takes_turns_at_messages_too() -> None:
    network = dataclasses.replace(FAST, rate=10.0, overhead=1.0)
    halves = (request(0, up=10, evaluate=0.0), request(1, encrypt=0.0, up=10, evaluate=0.0))
    # Encrypted at 1, both up at 2, there and back at 3, decrypted at 4 and 5.
    assert seconds([step(halves)], workers=2, network=network) == pytest.approx(5.0)
    shared = dataclasses.replace(network, processors="shared by workers")
    # Two seconds up and two of overhead, one after the other: 4 s where it was 2.
    assert seconds([step(halves)], workers=2, network=shared) == pytest.approx(7.0)
    # As many, and each evaluates by itself.
    for_messages = dataclasses.replace(network, processors="shared for messages")
    assert seconds([step(halves)], workers=2, network=for_messages) == pytest.approx(7.0)
    busy = step((request(0, up=10), request(1, encrypt=0.0, up=10)))
    assert seconds([busy], workers=2, network=for_messages) < seconds([busy], workers=2, network=shared)
    # Twice 10 s more, in which others have their turns.
    far = dataclasses.replace(shared, latency=10.0)
    assert 7.0 + 18.0 < seconds([step(halves)], workers=2, network=far) <= 7.0 + 20.0


def test_the_clients_end_of_a_transport_serves_all_connections() -> None:
    network = dataclasses.replace(FAST, rate=10.0)
    halves = (request(0, up=40, evaluate=0.0), request(1, encrypt=0.0, up=40, evaluate=0.0))
    # A message takes four seconds. The client's end is done with the first in half of it, or in all of it.
    half, whole = (dataclasses.replace(network, client_rate=rate) for rate in (20.0, 10.0))
    found = [seconds([step(halves)], workers=2, network=each) for each in (network, half, whole)]
    # Up at 5 both; at 5 and 7; at 5 and 9. Each is decrypted in a second.
    assert found == pytest.approx([7.0, 8.0, 10.0])


def test_whole_layers_at_several_workers_are_no_faster_in_a_single_stream() -> None:
    one, spread = step((request(0),), (request(0),)), step((request(0),), (request(1),))
    assert seconds([one]) == seconds([spread], workers=2) == pytest.approx(12.0)
    # Two micro-batches in turn, one product each at a worker of its own: the second's evaluation is hidden.
    assert seconds([spread, spread], 2, workers=2) < seconds([one, one], 2) < seconds([one, one], 1)


def test_replicas_take_what_another_is_busy_with() -> None:
    either = step((request(0, 1),))
    # Encrypted at 1 and 2; both evaluated at once, at 5 and 6.
    assert seconds([either, either], 2, workers=2) == pytest.approx(7.0)
    assert seconds([either, either], 2, workers=1 + 1, network=dataclasses.replace(FAST, processors="one")) > 7.0
    timeline = simulate([either] * 4, 1, 2, FAST)
    # In a single stream they are asked in turn.
    assert [a.worker for a in timeline.activities if a.what == "evaluate"] == [0, 1, 0, 1]


def test_a_turn_that_is_not_ready_holds_up_the_next() -> None:
    slow, quick = step((request(0, evaluate=50.0),)), step((request(1, evaluate=1.0),), (request(1, evaluate=1.0),))
    # Strict order: the second's first reply is there at 3, and its turn comes after the first task's, at 51.
    assert seconds([slow, quick], 2, workers=2) == pytest.approx(52.0 + 1.0 + 1.0 + 1.0 + 1.0)


def test_one_that_ends_makes_room_for_the_next() -> None:
    one = step((request(),))
    # With four under way or two, the worker is busy but for the first encryption and the last decryption.
    assert seconds([one] * 4, 4) == seconds([one] * 4, 2) == pytest.approx(1 + 4 * 4 + 1)


def test_latency_is_hidden_by_interleaving_and_bandwidth_is_not() -> None:
    short = [step(*[(request(evaluate=0.1),)] * 5)] * 2
    far, narrow = Network(1e9, 1.0), Network(10.0, 0.0)
    assert seconds(short, 2, network=far) < 0.7 * seconds(short, 1, network=far)
    wide = [step(*[(request(up=100, evaluate=0.1),)] * 5)] * 2
    assert seconds(wide, 2, network=narrow) > 0.8 * seconds(wide, 1, network=narrow)


def test_the_transport_limits_a_connection_and_the_card_all_of_them() -> None:
    halves = (request(0, up=100), request(1, encrypt=0.0, up=100))
    card, connection = Network(10.0, 0.0), Network(1e9, 0.0, rate=10.0)
    # One card: up at 11 and 21; two connections: both at 11.
    assert seconds([step(halves)], workers=2, network=card) == pytest.approx(21 + 4 + 1)
    assert seconds([step(halves)], workers=2, network=connection) == pytest.approx(11 + 4 + 2)
    assert seconds([step((request(),))], network=Network(1e9, 0.0, overhead=0.5)) == pytest.approx(6.5)


def test_on_one_processor_nothing_is_done_at_the_same_time() -> None:
    generator = random.Random(0)
    batches = [step(*((request(generator.randrange(3)),) for _ in range(4)), rest=0.5) for _ in range(3)]
    work = 3 * 4 * (0.5 + 1 + 4 + 1)
    network = dataclasses.replace(FAST, processors="one")
    assert seconds(batches, 3, workers=3, network=network) == pytest.approx(work)
    assert seconds(batches, 3, workers=3) < work


def test_any_step_is_at_least_what_each_has_to_do() -> None:
    generator = random.Random(1)
    for _ in range(30):
        workers = generator.randint(1, 4)
        batches = [
            step(
                *(
                    tuple(
                        request(
                            *generator.sample(range(workers), generator.randint(1, workers)),
                            encrypt=generator.random(),
                            up=generator.randrange(50),
                            evaluate=generator.random(),
                            down=generator.randrange(50),
                        )
                        for _ in range(generator.randint(1, 3))
                    )
                    for _ in range(generator.randint(1, 5))
                ),
                rest=generator.random(),
            )
            for _ in range(generator.randint(1, 4))
        ]
        network = Network(generator.uniform(5, 100), generator.random(), generator.uniform(5, 100), generator.random())
        for interleave in range(1, len(batches) + 1):
            timeline = simulate(batches, interleave, workers, network)
            held_together(timeline)
            busy = timeline.busy()
            client = sum(busy.get((what, -1), 0.0) for what in ("rest", "encrypt", "decrypt"))
            assert timeline.seconds >= max(client, *(busy.get(("evaluate", w), 0.0) for w in range(workers))) - 1e-9
            assert timeline == simulate(batches, interleave, workers, network)


def test_the_chart_holds_what_was_done() -> None:
    timeline = simulate([step((request(up=10),), rest=2.0)], 1, 1, Network(10.0, 0.0))
    chart = timeline.chart(0.0, timeline.seconds, 9)
    # rest 0-2, encrypt 2-3, up 3-4, evaluate 4-8, decrypt 8-9.
    assert chart["rest"] == pytest.approx([1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert chart["uplink"] == pytest.approx([0, 0, 0, 1, 0, 0, 0, 0, 0])
    assert chart["evaluate"] == pytest.approx([0, 0, 0, 0, 1, 1, 1, 1, 0])
    assert timeline.chart(3.5, 4.5, 2)["uplink"] == pytest.approx([1, 0])


def test_nothing_takes_no_time() -> None:
    assert seconds([]) == seconds([MicroBatch([])]) == 0.0
