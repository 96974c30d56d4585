/* The guest of a trial: it fills each processor's registers and its memory with what it knows, does the work of its condition,
 * and looks all the time whether everything is still as it left it. It says so on the serial line, once for each step:
 *
 *   COUNT COMPLAINTS TSC RTC ROUNDS ECHOES BLOCKS      (hexadecimal, but for the second: letters, - where there are none)
 *
 * C what CPUID says   R model-specific registers   G debug registers   F x87 and SSE registers   T the time-stamp counter
 * M memory   D the disk's content   E the disk does not answer   N a frame came back changed   B a card is out of reach
 * S a processor does not start
 *
 * Boots from its disk; the boot sector's bytes 496 and 497 are its condition and the number of processors. Built by:
 *
 *   gcc -Os -std=gnu11 -Wall -Wextra -ffreestanding -fno-pie -fno-stack-protector -fno-asynchronous-unwind-tables -fcf-protection=none
 *       -mno-red-zone -mgeneral-regs-only -mcmodel=small -nostdlib -static -Wl,-T,guest.ld,--build-id=none -o guest.bin guest.c
 *
 * Source: Intel SDM volume 3 (9.9 long mode, 8.4 start of processors, 10.5 local APIC); virtio 1.2, 4.1 (PCI), 5.1 and 5.2.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum { IDLE, COMPUTING, DIRTYING, BUSY };
enum { TABLES = 0x10000, STACKS = 0x20000, STATE = 0x30000, IDT = 0x34000, GDT = 0x35000, QUEUES = 0x40000,
       HELD = 0x80000, PATTERN = 0x100000, DIRTY = 0x200000 };
enum { PATTERN_BYTES = 256 << 10, PAGES = 2048, LAPIC = 0xfee00000u, ITERATIONS = 512 };

__asm__(
    ".section .head,\"ax\"\n"
    ".code16\n"
    "start: cli\n"
    " xorw %ax,%ax; movw %ax,%ds; movw %ax,%es; movw %ax,%ss; movw $0x7c00,%sp; sti\n"
    " movl $0,0x500\n"
    " movw $packet,%si; movb $0x42,%ah; int $0x13\n"
    "0: jc 0b\n"
    /* Where processors start that are woken: */
    "enter: cli; xorw %ax,%ax; movw %ax,%ds; lgdtl first_gdtr\n"
    " movl %cr0,%eax; orl $1,%eax; movl %eax,%cr0; ljmpl $8,$protected\n"
    ".code32\n"
    "protected: movw $16,%ax; movw %ax,%ds; movw %ax,%es; movw %ax,%ss\n"
    " cmpl $0,0x500; jne 2f\n"
    /* 4 GiB as they are, in pages of 2 MiB; the first processor makes the tables. */
    " xorl %eax,%eax; movl $0x10000,%edi; movl $0x1800,%ecx; cld; rep stosl\n"
    " movl $0x11003,0x10000; movl $0x12003,0x11000; movl $0x13003,0x11008; movl $0x14003,0x11010; movl $0x15003,0x11018\n"
    " movl $0x12000,%edi; movl $0x83,%eax; movl $2048,%ecx\n"
    "1: movl %eax,(%edi); addl $8,%edi; addl $0x200000,%eax; loop 1b\n"
    " movl $1,0x500\n"
    "2: movl $0x6a0,%eax; movl %eax,%cr4; movl $0x10000,%eax; movl %eax,%cr3\n" /* PAE, PGE, OSFXSR, OSXMMEXCPT */
    " movl $0xc0000080,%ecx; rdmsr; orl $0x901,%eax; wrmsr\n"                     /* SCE, LME, NXE */
    " movl %cr0,%eax; andl $0x9ffffff3,%eax; orl $0x80010022,%eax; movl %eax,%cr0\n" /* PG, WP, NE, MP; no EM, TS, CD, NW */
    " ljmp $24,$long_mode\n"
    ".code64\n"
    "long_mode: movw $16,%ax; movw %ax,%ds; movw %ax,%es; movw %ax,%ss; movw %ax,%fs; movw %ax,%gs\n"
    " movl $0xfee00020,%eax; movl (%rax),%edi; shrl $24,%edi\n"
    " movl %edi,%eax; incl %eax; shll $12,%eax; addl $0x20000,%eax; movl %eax,%esp; xorl %ebp,%ebp; call run\n"
    "packet: .byte 16,0; .word 31,0x7e00,0; .quad 1\n"
    ".balign 8\n"
    "first_gdt: .quad 0,0x00cf9b000000ffff,0x00cf93000000ffff,0x00af9b000000ffff\n"
    "first_gdtr: .word 31; .long first_gdt\n"
    ".org 496\n"
    ".globl settings\nsettings: .byte 0,1\n"
    ".org 510\n .byte 0x55,0xaa\n"
    ".text\n"
    /* What a woken processor finds at the page that it is told. */
    ".code16\n.globl wake\nwake: ljmp $0,$enter\n.globl wake_end\nwake_end:\n.code64\n"
    ".globl on_pit\non_pit: pushq %rax; movb $0x20,%al; outb %al,$0x20; incq 0x30000; popq %rax; iretq\n"
    ".globl on_timer\non_timer: pushq %rax; movl $0xfee000b0,%eax; movl $0,(%rax); popq %rax; iretq\n"
    ".globl on_fault\non_fault: movb $'X',%al; movw $0x3f8,%dx; outb %al,%dx\n3: cli; hlt; jmp 3b\n");

extern const u8 settings[2], wake[], wake_end[];
void on_pit(void), on_timer(void), on_fault(void);

struct queue { u64 ring; volatile u16 *doorbell; u16 next, seen; };
struct card { volatile u8 *common, *notify; u32 step; u8 ready; struct queue queue[2]; };
struct cpu {
    volatile u64 rounds;
    u64 cpuid, tsc, computed;
    u8 fpu[512] __attribute__((aligned(16)));
    u8 now[512] __attribute__((aligned(16)));
};
struct state {
    volatile u64 ticks;  /* at 0x30000: on_pit counts them */
    volatile u32 complaints;
    u32 count, echoes, blocks, generation, sent;
    struct card disk, net;
    struct cpu cpu[8];
};
#define S ((struct state *)STATE)

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0,%1" : : "a"(value), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 value; __asm__ volatile("inb %1,%0" : "=a"(value) : "Nd"(port)); return value; }
static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0,%1" : : "a"(value), "Nd"(port)); }
static inline u32 inl(u16 port) { u32 value; __asm__ volatile("inl %1,%0" : "=a"(value) : "Nd"(port)); return value; }
static inline void barrier(void) { __asm__ volatile("mfence" : : : "memory"); }
static inline void rest(void) { __asm__ volatile("sti; hlt; cli" : : : "memory"); }
static void wrmsr(u32 msr, u64 value) { __asm__ volatile("wrmsr" : : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32))); }
static u64 rdmsr(u32 msr) { u32 low, high; __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr)); return (u64)high << 32 | low; }
static u64 rdtsc(void) { u32 low, high; __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)); return (u64)high << 32 | low; }
static volatile u32 *lapic(u32 at) { return (volatile u32 *)(u64)(LAPIC + at); }

static void complain(char letter) { __atomic_fetch_or(&S->complaints, 1u << (letter - 'A'), __ATOMIC_SEQ_CST); }

static void say(char letter)
{
    while (!(inb(0x3fd) & 0x20))
        ;
    outb(0x3f8, letter);
}

static void say_number(u64 value, int digits)
{
    while (digits--)
        say("0123456789ABCDEF"[value >> (4 * digits) & 15]);
    say(' ');
}

/* --- what a processor keeps */

static u64 asked(void)
{
    static const u32 leaves[] = {0, 1, 2, 4, 7, 0xd, 0x80000000, 0x80000001, 0x80000002, 0x80000007, 0x80000008, 0x8000000a};
    u64 sum = 0;
    for (unsigned i = 0; i < sizeof leaves / sizeof *leaves; i++) {
        u32 a = leaves[i], b, c = 0, d;
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        if (leaves[i] == 1)
            b &= 0x00ffffff;  /* its APIC id */
        sum = (sum ^ a) * 0x100000001b3; sum = (sum ^ b) * 0x100000001b3;
        sum = (sum ^ c) * 0x100000001b3; sum = (sum ^ d) * 0x100000001b3;
    }
    return sum;
}

/* STAR, LSTAR, CSTAR, FMASK, bases of FS and GS, SYSENTER's three, PAT, one range of the MTRRs. */
static const struct { u32 msr; u64 value; } kept[] = {
    {0xc0000081, 0x0023001000000000}, {0xc0000082, 0x0000123456789000}, {0xc0000083, 0x0000223456789000}, {0xc0000084, 0x47700},
    {0xc0000100, 0x0000112233445000}, {0xc0000101, 0x0000556677889000}, {0xc0000102, 0x00007a7a7a7a7000}, {0x174, 0x18},
    {0x175, 0x0000323456789000}, {0x176, 0x0000423456789000}, {0x277, 0x0407050600070106}, {0x20e, 0x00000000f0000006},
    {0x20f, 0x000000fff0000800}};

static void keep(unsigned id)
{
    struct cpu *cpu = &S->cpu[id];
    for (unsigned i = 0; i < sizeof kept / sizeof *kept; i++)
        wrmsr(kept[i].msr, kept[i].value + (kept[i].msr >= 0xc0000100 ? (u64)id << 16 : 0));
    __asm__ volatile("mov %0,%%dr0; mov %1,%%dr1; mov %2,%%dr2; mov %3,%%dr3" : :
                     "r"(0x1111000UL + id), "r"(0x2222000UL + id), "r"(0x3333000UL + id), "r"(0x4444000UL + id));
    cpu->cpuid = asked();
    cpu->tsc = rdtsc();
    for (unsigned i = 0; i < 256; i++)
        cpu->fpu[160 + i] = (u8)(i * 37 + id * 11 + 1);
    __asm__ volatile(
        "fninit; fldcw %1; fldl2t; fldl2e; fldpi; fldlg2; fldln2; fld1; fldz; ldmxcsr %2\n"
        "movdqa 160(%0),%%xmm0; movdqa 176(%0),%%xmm1; movdqa 192(%0),%%xmm2; movdqa 208(%0),%%xmm3\n"
        "movdqa 224(%0),%%xmm4; movdqa 240(%0),%%xmm5; movdqa 256(%0),%%xmm6; movdqa 272(%0),%%xmm7\n"
        "movdqa 288(%0),%%xmm8; movdqa 304(%0),%%xmm9; movdqa 320(%0),%%xmm10; movdqa 336(%0),%%xmm11\n"
        "movdqa 352(%0),%%xmm12; movdqa 368(%0),%%xmm13; movdqa 384(%0),%%xmm14; movdqa 400(%0),%%xmm15\n"
        "fxsave64 (%0)" : : "r"(cpu->fpu), "m"(*(const u16 *)&(const u16){0x0b7f}), "m"(*(const u32 *)&(const u32){0x7f80})
        : "memory");
}

static void look(unsigned id)
{
    struct cpu *cpu = &S->cpu[id];
    u64 found[4], tsc = rdtsc();
    if (tsc < cpu->tsc)
        complain('T');
    cpu->tsc = tsc;
    if (asked() != cpu->cpuid)
        complain('C');
    for (unsigned i = 0; i < sizeof kept / sizeof *kept; i++)
        if (rdmsr(kept[i].msr) != kept[i].value + (kept[i].msr >= 0xc0000100 ? (u64)id << 16 : 0))
            complain('R');
    __asm__ volatile("mov %%dr0,%0; mov %%dr1,%1; mov %%dr2,%2; mov %%dr3,%3" :
                     "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3]));
    for (unsigned i = 0; i < 4; i++)
        if (found[i] != 0x1111000UL * (i + 1) + id)
            complain('G');
    /* st(0) counts, xmm0 to xmm7 gather what is in xmm8 to xmm15: the rest stays as it was, all of it in the registers. */
    long counted;
    __asm__ volatile("fld %%st(0); fistpll %0; fxsave64 (%1)" : "=m"(counted) : "r"(cpu->now) : "memory");
    if (counted != (long)cpu->computed)
        complain('F');
    for (unsigned i = 0; i < 32; i++) {
        u64 before = ((u64 *)(cpu->fpu + 160))[i], now = ((u64 *)(cpu->now + 160))[i];
        if (i < 16)
            before += cpu->computed * ((u64 *)(cpu->fpu + 288))[i];
        if (now != before)
            complain('F');
    }
    for (unsigned i = 1; i < 7; i++)
        for (unsigned j = 0; j < 10; j++)
            if (cpu->now[32 + 16 * i + j] != cpu->fpu[32 + 16 * i + j])
                complain('F');
    if (*(u16 *)cpu->now != *(u16 *)cpu->fpu || *(u32 *)(cpu->now + 24) != *(u32 *)(cpu->fpu + 24))
        complain('F');
}

static void compute(unsigned id)
{
    u32 left = ITERATIONS;
    __asm__ volatile(
        "1: fadd %%st(1),%%st\n"  /* st(1) is 1.0 */
        "paddq %%xmm8,%%xmm0; paddq %%xmm9,%%xmm1; paddq %%xmm10,%%xmm2; paddq %%xmm11,%%xmm3\n"
        "paddq %%xmm12,%%xmm4; paddq %%xmm13,%%xmm5; paddq %%xmm14,%%xmm6; paddq %%xmm15,%%xmm7\n"
        "decl %0; jnz 1b" : "+r"(left) : : "cc");
    S->cpu[id].computed += ITERATIONS;
}

/* --- memory */

static void check_pattern(int make)
{
    u32 *at = (u32 *)PATTERN, value = 0x9e3779b9;
    for (u32 i = 0; i < PATTERN_BYTES / 4; i++, value = value * 1664525 + 1013904223) {
        if (make)
            at[i] = value;
        else if (at[i] != value)
            complain('M');
    }
}

/* One word in each page, every round another one; before that, that of the last round. */
static void dirty(void)
{
    u32 round = S->generation++;
    for (u32 page = 0; page < PAGES; page++) {
        u32 *at = (u32 *)(DIRTY + 4096UL * page);
        if (round && at[(round - 1) & 1023] != (round - 1) * 2654435761u + page)
            complain('M');
        at[round & 1023] = round * 2654435761u + page;
    }
}

/* Each processor writes one word all the time, in a page of its own that nothing puts out of its TLB: an emulator that looks
 * there whether a page is still clean has to be told of each round of a move. */
static void hold(unsigned id)
{
    volatile u64 *at = (volatile u64 *)(HELD + 4096UL * id);
    if (*at != S->cpu[id].rounds)
        complain('M');
    *at = ++S->cpu[id].rounds;
}

/* --- cards: virtio over PCI, without interrupts */

static u32 config(u32 at) { outl(0xcf8, 0x80000000 | at); return inl(0xcfc); }
static void configure(u32 at, u32 value) { outl(0xcf8, 0x80000000 | at); outl(0xcfc, value); }

static void open(struct card *card, u32 at, u64 memory, unsigned queues)
{
    volatile u8 *part[5] = {0};
    if ((config(at) & 0xffff) != 0x1af4)
        return;
    configure(at + 4, config(at + 4) | 6);
    for (u32 next = config(at + 0x34) & 0xfc; next; next = config(at + next) >> 8 & 0xfc) {
        u32 head = config(at + next), kind = head >> 24, bar;
        if ((head & 0xff) != 9 || kind == 0 || kind > 4)
            continue;
        bar = config(at + next + 4) & 0xff;
        if ((config(at + 0x10 + 4 * bar) & 4) && config(at + 0x14 + 4 * bar)) {
            complain('B');
            return;
        }
        part[kind] = (volatile u8 *)(u64)((config(at + 0x10 + 4 * bar) & ~15u) + config(at + next + 8));
        if (kind == 2)
            card->step = config(at + next + 16);
    }
    if (!part[1] || !part[2])
        return;
    card->common = part[1];
    card->notify = part[2];
    card->common[20] = 0;
    while (card->common[20])
        ;
    card->common[20] = 3;
    *(volatile u32 *)(card->common + 8) = 0;
    *(volatile u32 *)(card->common + 12) = 0;
    *(volatile u32 *)(card->common + 8) = 1;
    *(volatile u32 *)(card->common + 12) = 1;  /* VIRTIO_F_VERSION_1 */
    card->common[20] = 11;
    for (unsigned i = 0; i < queues; i++) {
        struct queue *queue = &card->queue[i];
        queue->ring = memory + 0x4000 * i;
        for (u64 *word = (u64 *)queue->ring; word < (u64 *)(queue->ring + 0x4000); word++)
            *word = 0;
        *(volatile u16 *)(card->common + 22) = i;
        *(volatile u16 *)(card->common + 24) = 8;
        *(volatile u64 *)(card->common + 32) = queue->ring;
        *(volatile u64 *)(card->common + 40) = queue->ring + 0x100;
        *(volatile u64 *)(card->common + 48) = queue->ring + 0x200;
        *(volatile u16 *)(queue->ring + 0x100) = 1;
        *(volatile u16 *)(card->common + 28) = 1;
        queue->doorbell = (volatile u16 *)(card->notify + card->step * *(volatile u16 *)(card->common + 30));
    }
    card->common[20] = 15;
    card->ready = 1;
}

/* Buffers of a ring are at 0x1000 behind it. */
static void describe(struct queue *queue, u32 number, u64 at, u32 length, u16 flags)
{
    volatile u64 *one = (volatile u64 *)(queue->ring + 16 * number);
    one[0] = at;
    one[1] = length | (u64)flags << 32 | (u64)(number + 1) << 48;
}

static void offer(struct queue *queue, unsigned index, u16 head)
{
    ((volatile u16 *)(queue->ring + 0x104))[queue->next++ & 7] = head;
    barrier();
    *(volatile u16 *)(queue->ring + 0x102) = queue->next;
    barrier();
    *queue->doorbell = index;
}

static int used(struct queue *queue, u32 *head, u32 *length)
{
    if (*(volatile u16 *)(queue->ring + 0x202) == queue->seen)
        return 0;
    volatile u32 *one = (volatile u32 *)(queue->ring + 0x204 + 8 * (queue->seen++ & 7));
    *head = one[0];
    *length = one[1];
    return 1;
}

static int transfer(u32 kind, u32 sector)
{
    struct queue *queue = &S->disk.queue[0];
    u64 at = queue->ring + 0x1000;
    u32 head, length;
    *(u32 *)at = kind;
    *(u32 *)(at + 4) = 0;
    *(u64 *)(at + 8) = sector;
    *(volatile u8 *)(at + 0x800) = 255;
    describe(queue, 0, at, 16, 1);
    describe(queue, 1, at + 0x200, 512, kind ? 1 : 3);
    describe(queue, 2, at + 0x800, 1, 2);
    offer(queue, 0, 0);
    while (!used(queue, &head, &length))
        __asm__ volatile("pause");
    return *(volatile u8 *)(at + 0x800) == 0;
}

/* A sector is written, and the one that was written before is read. */
static void write_block(void)
{
    u32 *data = (u32 *)(S->disk.queue[0].ring + 0x1200), number = S->blocks;
    for (u32 i = 0; i < 128; i++)
        data[i] = number * 2654435761u + i;
    if (!transfer(1, 2048 + (number & 63)))
        complain('E');
    if (number) {
        if (!transfer(0, 2048 + ((number - 1) & 63)))
            complain('E');
        for (u32 i = 0; i < 128; i++)
            if (data[i] != (number - 1) * 2654435761u + i)
                complain('D');
    }
    S->blocks++;
}

static void receive(u32 number) { describe(&S->net.queue[0], number, S->net.queue[0].ring + 0x1000 + 0x400 * number, 0x400, 2); }

/* A frame goes out to everybody, and whatever came back is looked at: an Ethernet header of type 0x88b5 (IEEE 802.3, for local
 * experiments), a number, and what follows from it. */
static void exchange(void)
{
    struct queue *in = &S->net.queue[0], *out = &S->net.queue[1];
    u32 head, length;
    if (!S->sent)
        for (u32 i = 0; i < 8; i++) {
            receive(i);
            offer(in, 0, i);
        }
    while (used(in, &head, &length)) {
        u8 *frame = (u8 *)(in->ring + 0x1000 + 0x400 * head + 12);
        if (length > 100 && frame[12] == 0x88 && frame[13] == 0xb5) {
            u32 number = *(u32 *)(frame + 14);
            for (u32 i = 0; i < 64; i++)
                if (frame[18 + i] != (u8)(number + i))
                    complain('N');
            S->echoes++;
        }
        receive(head);
        offer(in, 0, head);
    }
    while (used(out, &head, &length))
        ;
    if (S->sent && (u16)(out->next - out->seen) > 6)
        return;
    u32 slot = S->sent & 7;
    u8 *packet = (u8 *)(out->ring + 0x1000 + 0x400 * slot), *frame = packet + 12;
    for (u32 i = 0; i < 12; i++)
        packet[i] = 0;
    for (u32 i = 0; i < 6; i++) {
        frame[i] = 0xff;
        frame[6 + i] = i ? 0x11 : 0x52;
    }
    frame[12] = 0x88;
    frame[13] = 0xb5;
    *(u32 *)(frame + 14) = S->sent;
    for (u32 i = 0; i < 82; i++)
        frame[18 + i] = (u8)(S->sent + i);
    describe(out, slot, (u64)packet, 12 + 100, 0);
    offer(out, 1, slot);
    S->sent++;
}

/* --- the machine */

static void gate(u32 vector, void (*to)(void))
{
    volatile u64 *one = (volatile u64 *)(u64)(IDT + 16 * vector);
    u64 at = (u64)to;
    one[0] = (at & 0xffff) | 24UL << 16 | 0x8eUL << 40 | (at & 0xffff0000) << 32;
    one[1] = 0;
}

static void tables(unsigned id)
{
    struct { u16 limit; u64 base; } __attribute__((packed)) gdt = {0x9f, GDT}, idt = {16 * 256 - 1, IDT};
    u64 task = GDT + 0x400 + 0x80 * id;
    volatile u64 *entry = (volatile u64 *)(u64)(GDT + 32 + 16 * id);
    entry[0] = 0x67 | (task & 0xffffff) << 16 | 0x89UL << 40 | (task >> 24 & 0xff) << 56;
    entry[1] = 0;
    __asm__ volatile("lgdt %0; lidt %1; ltr %w2; mov %3,%%es" : : "m"(gdt), "m"(idt), "r"(32 + 16 * id), "r"(16));
}

static void machine(void)
{
    for (u64 *word = (u64 *)STATE; word < (u64 *)(GDT + 0x1000); word++)
        *word = 0;
    u64 *gdt = (u64 *)GDT;
    gdt[1] = 0x00cf9b000000ffff;
    gdt[2] = 0x00cf93000000ffff;
    gdt[3] = 0x00af9b000000ffff;
    for (u32 i = 0; i < 32; i++)
        gate(i, on_fault);
    gate(0x20, on_pit);
    gate(0x40, on_timer);
    static const u8 pic[][2] = {{0x20, 0x11}, {0xa0, 0x11}, {0x21, 0x20}, {0xa1, 0x28}, {0x21, 4}, {0xa1, 2}, {0x21, 1},
                                {0xa1, 1}, {0x21, 0xfe}, {0xa1, 0xff}, {0x43, 0x34}, {0x40, 0x9c}, {0x40, 0x2e}};
    for (u32 i = 0; i < sizeof pic / 2; i++)
        outb(pic[i][0], pic[i][1]);
    *lapic(0xf0) = 0x1ff;
    *lapic(0x350) = 0x700;
}

static void pause_ticks(u32 ticks)
{
    for (u64 end = S->ticks + ticks; S->ticks < end;)
        rest();
}

static void start_others(void)
{
    for (u32 i = 0; i < (u32)(wake_end - wake); i++)
        ((u8 *)0x6000UL)[i] = wake[i];
    for (u32 id = 1; id < settings[1]; id++) {
        *lapic(0x310) = id << 24;
        *lapic(0x300) = 0x4500;
        pause_ticks(2);
        for (u32 turn = 0; turn < 200 && !S->cpu[id].rounds; turn++) {
            if (turn == 0 || turn == 100) {
                *lapic(0x310) = id << 24;
                *lapic(0x300) = 0x4606;
            }
            pause_ticks(1);
        }
        if (!S->cpu[id].rounds)
            complain('S');
    }
}

static u8 cmos(u8 at) { outb(0x70, at); return inb(0x71); }

static void tell(void)
{
    u32 complaints = S->complaints;
    u64 rounds = ~0UL;
    u8 time[3];
    for (u32 id = 1; id < settings[1]; id++)
        if (S->cpu[id].rounds < rounds)
            rounds = S->cpu[id].rounds;
    do {
        while (cmos(10) & 0x80)
            ;
        time[0] = cmos(4); time[1] = cmos(2); time[2] = cmos(0);
    } while (time[2] != cmos(0));
    say_number(++S->count, 8);
    if (!complaints)
        say('-');
    for (u32 i = 0; i < 26; i++)
        if (complaints >> i & 1)
            say('A' + i);
    say(' ');
    say_number(rdtsc(), 16);
    say_number(time[0] << 16 | time[1] << 8 | time[2], 6);
    say_number(settings[1] > 1 ? rounds : S->cpu[0].rounds, 8);
    say_number(S->echoes, 8);
    say_number(S->blocks, 8);
    say('\n');
}

__attribute__((section(".text.run"))) void run(unsigned id)
{
    u8 condition = settings[0];
    if (!id)
        machine();
    tables(id);
    keep(id);
    *(volatile u64 *)(HELD + 4096UL * id) = S->cpu[id].rounds;
    if (id) {
        *lapic(0xf0) = 0x1ff;
        *lapic(0x3e0) = 0xb;
        *lapic(0x320) = 0x20040;
        *lapic(0x380) = 10000000;
    } else {
        check_pattern(1);
        for (const char *word = "BOOT\n"; *word; word++)
            say(*word);
        start_others();
        if (condition == BUSY) {
            open(&S->disk, 0x14 << 11, QUEUES, 1);
            open(&S->net, (config(0x10 << 11 | 0x18) >> 8 & 0xff) << 16, QUEUES + 0x8000, 2);
            if (!S->disk.ready || !S->net.ready)
                complain('B');
        }
    }
    __asm__ volatile("sti");
    for (;;) {
        look(id);
        hold(id);
        if (condition == COMPUTING)
            for (u32 i = 0; i < 64; i++)
                compute(id);
        if (condition == DIRTYING && !id)
            dirty();
        if (condition == BUSY && !id && S->disk.ready && S->net.ready)
            for (u32 i = 0; i < 4; i++) {
                write_block();
                exchange();
            }
        if (!id && (condition == IDLE || condition == BUSY || S->cpu[0].rounds % 8 == 0)) {
            check_pattern(0);
            tell();
        }
        if (condition == IDLE || (id && condition != COMPUTING))
            for (u32 i = 0; i < (id ? 1 : 4); i++)
                __asm__ volatile("hlt");
    }
}
