"""What people look at: tables of a plan, of a run, of a transformed model. Reads results, never the loop."""
