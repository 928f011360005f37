"""Output for people: tables, figures and pages of a plan, a run or a transformed model. It reads results only."""
