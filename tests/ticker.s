# The boot sector that tests/ticker.py holds: a guest that counts. At each step it looks whether its memory and its disk are
# what it left, writes the count to the disk, and says it on the serial line.
# as --32 -o ticker.o ticker.s && ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o ticker.bin ticker.o
.code16
.globl _start
_start:
 cli
 xorw %ax,%ax
 movw %ax,%ds
 movw %ax,%ss
 movw $0x7c00,%sp
 sti
 cld
 movb %dl,drive
 # 64 KiB of a pattern at 0x20000
 movw $0x2000,%ax
 movw %ax,%es
 xorw %di,%di
 xorw %ax,%ax
1: addw $0x9e37,%ax
 stosw
 testw %di,%di
 jnz 1b
step:
 # the pattern is still there
 movw $0x2000,%ax
 movw %ax,%es
 xorw %di,%di
 xorw %ax,%ax
2: addw $0x9e37,%ax
 scasw
 je 3f
 movb $'M',%al
 call say
 jmp 4f
3: testw %di,%di
 jnz 2b
4: # the disk has the last count
 movb $0x42,%ah
 call transfer
 movl count,%eax
 testl %eax,%eax
 jz 5f
 cmpl %eax,0x8000
 je 5f
 movb $'D',%al
 call say
5: incl count
 movl count,%eax
 movl %eax,0x8000
 movw $0x4300,%ax
 call transfer
 # say it, in eight hexadecimal digits
 movl count,%ebx
 movw $8,%cx
6: roll $4,%ebx
 movb %bl,%al
 andb $15,%al
 cmpb $10,%al
 sbbb $0x69,%al
 das
 call say
 loop 6b
 movb $10,%al
 call say
 # at rest until the next tick, or busy writing to 384 KiB
 cmpb $0,busy
 jne 7f
 hlt
 jmp step
7: incw %bp
 movw $0x3000,%ax
8: movw %ax,%es
 movw %bp,%es:(0)
 addw $0x100,%ax
 cmpw $0x9000,%ax
 jb 8b
 testw $63,%bp
 jz step
 jmp 7b
# the count's sector, one of 64, read (%ah = 0x42) or written (%ah = 0x43) at 0x8000
transfer:
 movl count,%ebx
 andl $63,%ebx
 addl $2048,%ebx
 movl %ebx,block
 xorb %al,%al
 movb drive,%dl
 movw $packet,%si
 int $0x13
 jnc 9f
 movb $'E',%al
 call say
9: ret
say:
 pushw %ax
 movw $0x3fd,%dx
1: inb %dx,%al
 testb $0x20,%al
 jz 1b
 popw %ax
 movw $0x3f8,%dx
 outb %al,%dx
 ret
count: .long 0
drive: .byte 0
.balign 4
packet: .byte 16,0
 .word 1,0x8000,0
block: .long 0,0
.org 508
busy: .byte 0
