"""The control loop: messages, actuator, controller, what it knows of the clock."""
