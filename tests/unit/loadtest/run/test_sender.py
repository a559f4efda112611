"""Who sends what: each request once, a session's turns all by the process that waits for their answers."""

from hypothesis import given
from hypothesis import strategies as st

from loadtest.run.sender import shares
from loadtest.schedule import PlannedRequest, Schedule


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 4))
def test_shares_when_turns_follow_one_another_are_of_one_sender_and_heads_are_dealt_evenly(links: list[int], num_senders: int) -> None:
    """A link of 0 begins a session; of n follows the request n places before, where there is one."""
    requests = tuple(
        PlannedRequest(at_s=0.0, input_tokens=1, output_tokens=1, after=index - link if 0 < link <= index else None)
        for index, link in enumerate(links)
    )
    found = shares(Schedule(block_size=1, requests=requests, source="s"), num_senders)
    assert len(found) == len(requests)
    heads = [0] * num_senders
    for request, sender in zip(requests, found, strict=True):
        if request.after is None:
            heads[sender] += 1
        else:
            assert sender == found[request.after]
    assert max(heads) - min(heads) <= 1
