"""What makes LOP a cluster program: the fleet of evaluators, and one job per stage."""
