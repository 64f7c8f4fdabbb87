"""How long a device had each step to itself, from the times that the host sees. Pure.

A device computes steps in turn while the host runs ahead, and its queue is short: a launch may
block until most of the step before it, or of itself, is computed. Then the launch shows the time,
and the wait none of it. No time is guessed: where it is not known it is 0.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """A step's launch: the device may begin when it begins. Times in seconds of one clock."""

    began_at: float
    launch_s: float
    has_prefill: bool


class StepClock:
    """Called for each step in turn, once the host has waited for it."""

    def __init__(self) -> None:
        self._done_at = 0.0  # the earliest time at which the next step may have begun

    def device_s(
        self, step: Launch, following: Launch | None, began_waiting_at: float, done_at: float
    ) -> float:
        """Seconds that the device had `step` to itself; `following` was launched before the wait.

        A wait that is shorter than the launch before it shows that the launch blocked: a chunk is
        computed for the most part during its own launch, and a step before it has ended during that
        launch, at a time that is not known.
        """
        blocked = following is not None and done_at - began_waiting_at < following.launch_s
        if following is not None and blocked and (step.has_prefill or following.has_prefill):
            self._done_at = following.began_at
            return step.launch_s if step.has_prefill else 0.0
        seconds = done_at - max(step.began_at, self._done_at)
        self._done_at = done_at
        return seconds
