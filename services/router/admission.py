"""Who may come in: a bounded number of requests, and none that is predicted to be too late. Refusing early costs a client one round trip,
refusing late costs everybody the work.

Two gates: enter() before anything is done for a request, check() when its route is known and nothing has been sent. Knows no workers, only
what a route predicts; one per router, shared with nobody.
"""

from types import TracebackType
from typing import Self

from services.core.errors import Overloaded, QueueFull
from services.router.route import Route

MIN_RETRY_S, MAX_RETRY_S = 0.1, 30.0
# A full queue is as long as the limit lets it be: were predictions right on average, half of what is admitted then would be late.
KEPT = 0.9  # of those admitted, how many shall keep their limit
LEARN = 0.05  # how far one first token moves what is known of predictions, as a share of the one predicted


class Admission:
    """
    max_in_flight   requests that this router may have anywhere: being routed, waiting, being answered
    ttft_slo_s      a request that is predicted to wait longer for its first token is refused; None: only its own deadline counts
    """

    def __init__(self, *, max_in_flight: int, ttft_slo_s: float | None = None) -> None:
        self._max_in_flight = max_in_flight
        self._ttft_slo_s = ttft_slo_s
        self._typical_s = 1.0  # from route to last token, as predicted for recent requests
        self._lateness_s = 0.0  # behind the prediction: a share KEPT of recent first tokens came no later than this
        self.num_in_flight = 0

    def enter(self) -> "Place":
        """Takes a place, to be left by leaving its `with`. Raises QueueFull when there is none."""
        if self.num_in_flight >= self._max_in_flight:
            # By then a quarter of the places will have changed hands.
            retry_after_s = _bounded(self._typical_s / 4)
            raise QueueFull(f"{self.num_in_flight} requests are in flight, which is the limit", retry_after_s=retry_after_s)
        self.num_in_flight += 1
        return Place(self)

    def ttft_limit_s(self, remaining_s: float | None) -> float | None:
        """Up to what may be predicted for a request with this much time left, so that its first token is still of use; None: anything."""
        limit_s = self._limit_s(remaining_s)
        return None if limit_s is None else limit_s - self._margin_s(limit_s)

    def check(self, route: Route, *, remaining_s: float | None = None) -> None:
        """Lets a request go its way. Raises Overloaded when it would be too late, with the time until the queues will have drained so far.

        The only request of this router is always let through: if predictions were wrong, nothing else would ever correct them.
        """
        limit_s = self._limit_s(remaining_s)
        if limit_s is not None and self.num_in_flight > 1:
            expected_s = route.predicted_ttft_s + self._margin_s(limit_s)
            if expected_s > limit_s:
                raise Overloaded(
                    f"the first token would come after {expected_s:.3g} s, the limit is {limit_s:.3g} s",
                    retry_after_s=_bounded(expected_s - limit_s),
                )
        self._typical_s += 0.05 * (route.predicted_s - self._typical_s)

    def note_first_token(self, route: Route, ttft_s: float) -> None:
        """A first token came `ttft_s` after its request had been routed: tells how far predictions can be relied on."""
        # Steps up and down in this proportion settle where the share KEPT lies below.
        is_late = ttft_s - route.predicted_ttft_s > self._lateness_s
        step_s = LEARN * route.predicted_ttft_s
        self._lateness_s = max(0.0, self._lateness_s + step_s * (KEPT if is_late else KEPT - 1.0))

    def _limit_s(self, remaining_s: float | None) -> float | None:
        """The objective or the deadline, whichever is nearer."""
        if remaining_s is None or self._ttft_slo_s is None:
            return self._ttft_slo_s if remaining_s is None else remaining_s
        return min(remaining_s, self._ttft_slo_s)

    def _margin_s(self, limit_s: float) -> float:
        """Never more than half: whoever would come in far below the limit does, and corrects what is known."""
        return min(self._lateness_s, limit_s / 2)

    def leave(self) -> None:
        assert self.num_in_flight > 0
        self.num_in_flight -= 1


class Place:
    """One request's place among those in flight."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission

    def leave(self) -> None:
        """Gives the place to somebody else; once is enough."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.leave()


def _bounded(seconds: float) -> float:
    return max(MIN_RETRY_S, min(MAX_RETRY_S, seconds))
