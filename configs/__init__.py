"""What a person writes by hand: settings and task files, their schemas, and the errors everybody shares.

Imports nothing of ours. Nothing here touches the network, Ray, torch or a database.
"""
