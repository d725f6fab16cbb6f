// A photo of the camera: the first press shows it, the second takes the picture.

let stream = null;

/** @returns {Promise<File | null>} null where the camera has only been opened */
export async function takePhoto(video, button) {
  if (!stream) {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment', width: { ideal: 1280 } } });
    } catch (error) {
      throw new Error(`There is no camera here, or the page may not use it (${error.name}); allow it, or choose a file.`);
    }
    video.srcObject = stream;
    video.hidden = false;
    await video.play();
    button.textContent = 'Take the picture';
    return null;
  }
  const canvas = document.createElement('canvas');
  Object.assign(canvas, { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext('2d').drawImage(video, 0, 0);
  stream.getTracks().forEach((track) => track.stop());
  stream = video.srcObject = null;
  video.hidden = true;
  button.textContent = 'Camera';
  return new Promise((done) => canvas.toBlob((blob) => done(new File([blob], 'photo.png', { type: 'image/png' })), 'image/png'));
}
