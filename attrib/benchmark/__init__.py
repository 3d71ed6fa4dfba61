"""Speed beside what bounds it and what others do: every contender in a process of its own, interleaved, as ratios."""
