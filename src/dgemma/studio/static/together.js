// One scrubber for several canvases: all of them are shown at the same share of their steps, or at the same time.

const FRAMES = 120; // positions of the slider
const LONGEST = 6000; // milliseconds that playing takes

export default {
  template: `
    <div class="together" role="group" aria-label="Both canvases, step by step">
      <button class="cv-button cv-round" type="button" @click="play" :aria-label="playing ? 'Pause both' : 'Play both'">
        <i class="q-icon material-icons" aria-hidden="true">{{ playing ? 'pause' : 'play_arrow' }}</i></button>
      <input type="range" min="0" :max="frames" v-model.number="at" @input="pause(); walk()" aria-label="Both canvases"
             :aria-valuetext="where">
      <span class="cv-where">{{ where }}</span>
      <button class="cv-button" type="button" @click="turn" :aria-pressed="timed"
              title="Same time since the request began, instead of the same share of steps">By time</button>
    </div>`,

  props: { canvases: Array },

  data() {
    return { at: FRAMES, frames: FRAMES, timed: false, playing: false, where: "the end of both" };
  },

  beforeUnmount() {
    this.pause();
  },

  methods: {
    async walk() {
      const canvases = this.canvases.map((id) => getElement(id)).filter(Boolean);
      await Promise.all(canvases.map((canvas) => canvas.unfold()));
      const share = this.at / this.frames;
      const seconds = share * Math.max(...canvases.map((canvas) => canvas.seconds()));
      for (const canvas of canvases) canvas.walk(share, this.timed ? seconds : null);
      this.where = this.timed ? `${seconds.toFixed(2)} s` : `${Math.round(100 * share)} % of the steps`;
    },

    turn() {
      this.timed = !this.timed;
      this.walk();
    },

    pause() {
      this.playing = false;
      clearTimeout(this.timer);
    },

    async play() {
      if (this.playing) return this.pause();
      this.playing = true;
      if (this.at >= this.frames) this.at = 0;
      const next = async () => {
        await this.walk();
        if (!this.playing) return;
        if (this.at >= this.frames) return this.pause();
        this.at += 1;
        this.timer = setTimeout(next, LONGEST / this.frames);
      };
      await next();
    },
  },
};
