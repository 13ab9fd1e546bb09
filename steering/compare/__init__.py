"""Methods to steer towards a concept, compared at equal KL: command.py runs the protocol, arms.py has the methods, report.py the result."""
