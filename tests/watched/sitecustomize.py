"Python imports this when it starts: a process below a watched command announces its changes, too."

from watch import watch

watch()
