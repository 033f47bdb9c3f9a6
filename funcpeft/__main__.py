"""Lets ``python -m funcpeft`` be the ``funcpeft`` command."""

from funcpeft.cli import main

raise SystemExit(main())
