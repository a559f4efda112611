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


class Admission:
    """
    max_in_flight   requests that this router may have anywhere: being routed, waiting, being answered
    ttft_slo_s      a request that is predicted to wait longer for its first token is refused; None: only its own deadline counts
    """

    def __init__(self, *, max_in_flight: int, ttft_slo_s: float | None = None) -> None:
        self._max_in_flight = max_in_flight
        self._ttft_slo_s = ttft_slo_s
        self._typical_s = 1.0  # from route to last token, as predicted for recent requests
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
        """Until when a first token is of use to a request with this much time left; None: always."""
        if remaining_s is None or self._ttft_slo_s is None:
            return self._ttft_slo_s if remaining_s is None else remaining_s
        return min(remaining_s, self._ttft_slo_s)

    def check(self, route: Route, *, remaining_s: float | None = None) -> None:
        """Lets a request go its way. Raises Overloaded when it would be too late, with the time until the queues will have drained so far.

        The only request of this router is always let through: if predictions were wrong, nothing else would ever correct them.
        """
        limit_s = self.ttft_limit_s(remaining_s)
        if limit_s is not None and route.predicted_ttft_s > limit_s and self.num_in_flight > 1:
            raise Overloaded(
                f"the first token would come after {route.predicted_ttft_s:.3g} s, the limit is {limit_s:.3g} s",
                retry_after_s=_bounded(route.predicted_ttft_s - limit_s),
            )
        self._typical_s += 0.05 * (route.predicted_s - self._typical_s)

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
